"""Growth among all weights: the dense gradient exists here alone, a part at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from agent_optax._tree import all_finite
from agent_optax.layers._connections import Connections
from agent_optax.layers._probe import DensePart, probed_loss
from agent_optax.layers._sparse_layer import SparseLayer, connections_in
from agent_optax.sparsity._layer import Layer
from agent_optax.sparsity._topology import Topology
from agent_optax.sparsity.selection._tiles import whole


class Part(NamedTuple):
    """Consecutive outputs of a layer."""

    layer: int
    start: int
    size: int


def grow_among_all(
    loss_fn: Callable[..., Any],
    has_aux: bool,
    inputs: tuple[Any, ...],
    layers: Sequence[SparseLayer],
    topology: Topology,
    step: jax.Array,
    keys: jax.Array,
    max_bytes: int,
) -> tuple[list[Connections], jax.Array]:
    """New connections of each layer, and whether gradients and weights are finite.

    Args:
        loss_fn: as `rewire` takes it.
        has_aux: as `rewire` takes it.
        inputs: parameters, connections, batch, and what the loss takes besides.
        layers: the sparse layers among them.
        topology: the rule.
        step: the number of steps taken.
        keys: of each layer.
        max_bytes: the most that dense gradients may take at a time.
    """
    masks: list[list[jax.Array]] = [[] for _ in layers]
    is_finite = jnp.asarray(True)
    for parts in _passes(layers, max_bytes):
        starts = [jnp.asarray(part.start, jnp.int32) for part in parts]
        kinds = tuple((part.layer, part.size, str(layers[part.layer].values.dtype)) for part in parts)
        grads = _dense_gradients(loss_fn, has_aux, kinds, inputs, starts)
        for part, start, grad in zip(parts, starts, grads, strict=True):
            layer, own_key = layers[part.layer], keys[part.layer]
            if part.size < layer.connections.outputs:
                own_key = jax.random.fold_in(own_key, start)
            units, usable = _in_units(layer.connections.without_point(), layer.values, grad, start)
            masks[part.layer].append(_new_mask(topology, units, step, own_key))
            is_finite &= usable
    new = [_with_mask(layer.connections.without_point(), own) for layer, own in zip(layers, masks, strict=True)]
    return new, is_finite


def _passes(layers: Sequence[SparseLayer], max_bytes: int) -> list[list[Part]]:
    """Parts of all layers, those together whose gradients have room for each other."""
    passes: list[list[Part]] = []
    room = 0
    for i, layer in enumerate(layers):
        outputs, group = layer.connections.outputs, layer.connections.group
        of_output = layer.connections.inputs * layer.values.dtype.itemsize
        num_groups = -(-outputs // group)
        num_parts = -(-num_groups // max(1, max_bytes // (of_output * group)))
        size = -(-num_groups // num_parts) * group
        for start in range(0, outputs, size):
            part = Part(i, start, min(size, outputs - start))
            if not passes or part.size * of_output > room:
                passes.append([])
                room = max_bytes
            passes[-1].append(part)
            room -= part.size * of_output
    return passes


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _dense_gradients(
    loss_fn: Callable[..., Any],
    has_aux: bool,
    kinds: tuple[tuple[int, int, str], ...],
    inputs: tuple[Any, ...],
    starts: Sequence[jax.Array],
) -> list[jax.Array]:
    """[inputs, size] for each (layer, size, dtype): the gradient for all weights of its outputs, existing or not."""
    loss = probed_loss(loss_fn, has_aux, *inputs)

    def of_kernels(kernels: Sequence[jax.Array]) -> jax.Array:
        parts = zip(kinds, kernels, starts, strict=True)
        return loss({layer: DensePart(kernel, start) for (layer, _, _), kernel, start in parts})

    num_inputs = [connections.inputs for connections in connections_in(inputs[1])]
    return jax.grad(of_kernels)([jnp.zeros((num_inputs[i], size), dtype) for i, size, dtype in kinds])


@jax.jit
def _in_units(
    connections: Connections, values: jax.Array, grads: jax.Array, start: jax.Array
) -> tuple[Layer, jax.Array]:
    """A part of a layer in units of its pattern, and whether its numbers are finite."""
    values, grads = whole(values), whole(grads)
    units = connections.pattern.units(Layer(grads, jnp.ones_like(grads, dtype=bool), grads, ever_active=None))
    weights, mask = connections.unit_part(values, start, grads.shape[1])
    return units._replace(weights=weights, mask=mask), all_finite((grads, values))


@functools.partial(jax.jit, static_argnums=0)
def _new_mask(topology: Topology, part: Layer, step: jax.Array, key: jax.Array) -> jax.Array:
    """Bool [inputs, units]; compiled once for parts of equal shapes, however many weights they have."""
    return topology.rewire_layer(part, step, key)


@jax.jit
def _with_mask(connections: Connections, parts: Sequence[jax.Array]) -> Connections:
    return connections.with_unit_mask(jnp.concatenate(parts, axis=1))
