"""Growth among weights drawn at random: a dense gradient is never formed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from agent_optax._tree import all_finite
from agent_optax.layers._connections import Connections
from agent_optax.layers._probe import Candidates, probed_loss
from agent_optax.layers._sparse_layer import SparseLayer
from agent_optax.sparsity._layer import Layer
from agent_optax.sparsity._topology import Topology
from agent_optax.sparsity.selection._tiles import whole
from agent_optax.sparsity.storages._positions import positions


def grow_among_candidates(
    loss_fn: Callable[..., Any],
    has_aux: bool,
    inputs: tuple[Any, ...],
    layers: Sequence[SparseLayer],
    topology: Topology,
    step: jax.Array,
    keys: jax.Array,
    share: float,
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
        share: how many candidates, over the number of weights.
    """
    old = [layer.connections.without_point() for layer in layers]
    split = [jax.random.split(key) for key in keys]
    drawn = {}
    for i, connections in enumerate(old):
        number = num_candidates(connections, share)
        if number:
            drawn[i] = draw_candidates(split[i][0], connections, number)
    leaves = tuple(layers[i].leaf for i in drawn)
    grads = _gradients(loss_fn, has_aux, leaves, inputs, drawn)
    new, is_finite = old, jnp.asarray(True)
    for i, own_grads in zip(drawn, grads, strict=True):
        new[i], usable = _rewired_among(topology, old[i], drawn[i], layers[i].values, own_grads, step, split[i][1])
        is_finite &= usable
    return new, is_finite


def num_candidates(connections: Connections, share: float) -> int:
    """How many places are drawn for each row of `places`: so many times the weights there, or all that are free."""
    k = connections.places.shape[1]
    return min(math.ceil(share * k), connections.num_places - k)


@functools.partial(jax.jit, static_argnums=2)
def draw_candidates(key: jax.Array, connections: Connections, number: int) -> Connections:
    """Connections of `number` places a row at which no weight exists: one drawn from each of as many equal strata.

    Strata of the free places: all are equally likely to within rounding, none is drawn twice, and nothing as large as
    the dense layer is formed.
    """
    places, num_free = connections.places, connections.num_places - connections.places.shape[1]
    bounds = jnp.asarray([i * num_free // number for i in range(number + 1)], jnp.int32)
    ranks = jax.random.randint(key, (len(places), number), bounds[:-1], bounds[1:])
    num_smaller = places - jnp.arange(places.shape[1])  # free places below each weight
    num_before = jax.vmap(functools.partial(jnp.searchsorted, side="right"))(num_smaller, ranks)
    return connections.with_places((ranks + num_before).astype(jnp.int32))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _gradients(
    loss_fn: Callable[..., Any],
    has_aux: bool,
    leaves: tuple[int, ...],
    inputs: tuple[Any, ...],
    drawn: dict[int, Connections],
) -> list[tuple[jax.Array, jax.Array]]:
    """Gradients for the weights, which are these leaves of the parameters, and for the candidates of each layer."""
    params, *others = inputs
    arrays, treedef = jax.tree.flatten(params)

    def loss(weights: Sequence[jax.Array], zeros: Sequence[jax.Array]) -> jax.Array:
        replaced = list(arrays)
        for leaf, array in zip(leaves, weights, strict=True):
            replaced[leaf] = array
        probes = {i: Candidates(c, zero) for (i, c), zero in zip(drawn.items(), zeros, strict=True)}
        return probed_loss(loss_fn, has_aux, treedef.unflatten(replaced), *others)(probes)

    weights = [arrays[leaf] for leaf in leaves]
    zeros = [jnp.zeros(c.values_shape, w.dtype) for c, w in zip(drawn.values(), weights, strict=True)]
    return list(zip(*jax.grad(loss, argnums=(0, 1))(weights, zeros), strict=True))


@functools.partial(jax.jit, static_argnums=0)
def _rewired_among(
    topology: Topology,
    connections: Connections,
    candidates: Connections,
    values: jax.Array,
    grads: tuple[jax.Array, jax.Array],  # of the weights, of the candidates
    step: jax.Array,
    key: jax.Array,
) -> tuple[Connections, jax.Array]:
    """New connections, of the weights that exist and the candidates, and whether all numbers are finite.

    The topology sees a layer that holds only these: columns of k weights and m candidates.
    """

    def in_columns(own: jax.Array, others: jax.Array) -> jax.Array:
        return jnp.concatenate([connections.in_columns(whole(own)), candidates.in_columns(whole(others))])

    weights, gradients = in_columns(values, jnp.zeros_like(grads[1])), in_columns(*grads)
    k = connections.places.shape[1]
    exists = jnp.broadcast_to(jnp.arange(len(weights))[:, None] < k, weights.shape)
    units = connections.pattern.units(Layer(weights, exists, gradients, ever_active=None))
    mask = topology.rewire_layer(units, step, key)
    chosen = jax.vmap(lambda bits: positions(bits, k))(jnp.packbits(mask.T, axis=1))
    places = jnp.concatenate([connections.places, candidates.places], axis=1)
    new = jnp.sort(jnp.take_along_axis(places, chosen, axis=1), axis=1)
    return connections.with_places(new), all_finite((grads, values))
