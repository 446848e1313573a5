"""A topology update, which runs rarely: it must cost the other steps nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from agent_optax._tree import is_masked, zero_like
from agent_optax.correction._find import find_corrections
from agent_optax.sparsity._axes import Axes
from agent_optax.sparsity._equal_layers import map_layers
from agent_optax.sparsity._layer import Layer
from agent_optax.sparsity._pattern import Pattern
from agent_optax.sparsity._pruned_leaf import PrunedLeaf
from agent_optax.sparsity._sparse_optimizer import SparseOptimizer
from agent_optax.sparsity._state import SparsifyState, total
from agent_optax.sparsity._topology import Topology

Carry = TypeVar("Carry")


def when(due: jax.Array, body: Callable[[Carry], Carry], carry: Carry) -> Carry:
    """``body(carry)`` if due, else `carry` itself.

    A while loop with at most one iteration: its carry stays in place, where a conditional copies what it passes
    through, and under `jax.vmap` it iterates only if some element is due, where a conditional becomes a select that
    computes both branches in every step. The conditional inside the iteration is there because XLA moves what does not
    depend on the carry out of a loop, where every step would pay for it, but not out of a conditional. A test counts
    the copies.
    """

    def iterate(state: tuple[jax.Array, Carry]) -> tuple[jax.Array, Carry]:
        count, carry = state
        return count + 1, jax.lax.cond(count < 1, body, lambda carry: carry, carry)

    return jax.lax.while_loop(lambda state: (state[0] < 1) & due, iterate, (jnp.zeros((), jnp.int32), carry))[1]


class Changes(NamedTuple):
    """Counts of a topology update."""

    num_dropped: jax.Array  # int32 []
    num_grown: jax.Array  # int32 []


class LeafStorage(NamedTuple):
    """How a storage takes part in a topology update, leaf by leaf; `stored` is what it holds of one leaf."""

    see: Callable[[Any], Layer]  # stored -> the leaf, whole, its axes as they are
    change: Callable[[Any, Layer, jax.Array], tuple[Any, Changes]]  # (stored, leaf, new mask) -> what it will hold
    keep: Callable[[Any], Any]  # stored -> what it will hold where nothing changes


def rewired(
    optimizer: SparseOptimizer,
    storage: LeafStorage,
    pruned: Sequence[PrunedLeaf],
    stored: Sequence[Any],
    usable: jax.Array,
    state: SparsifyState,
) -> tuple[list[Any], SparsifyState]:
    """What the storage will hold of each leaf, and the state with key and counts.

    Nothing changes unless `usable`, which is False when a gradient or weight is not finite. Leaves that need no other
    leaf change one after the other, each in a conditional of its own, so that the memory of one serves the next.
    """
    topology, step = optimizer.topology, state.topology_step
    next_key, key = jax.random.split(jax.random.wrap_key_data(state.topology_key))
    momenta = topology.momenta(state.topology_state, len(stored))
    statistics = topology.statistics(state.topology_state, len(stored))
    kept = list(zip(momenta, statistics, strict=True))
    kinds = [(leaf.pattern, leaf.axes) for leaf in pruned]

    def see(stored: Any, kept: tuple[Any, Any]) -> Layer:
        return storage.see(stored)._replace(momentum=kept[0], statistic=kept[1])

    def rewire_leaf(kind: tuple[Pattern, Axes], stored: Any, kept: Any, key: jax.Array) -> tuple[Any, Changes]:
        pattern, axes = kind
        leaf = see(stored, kept)

        def new_mask(layer: Layer, key: jax.Array) -> jax.Array:
            return pattern.entries(topology.rewire_layer(pattern.units(layer), step, key), layer.mask)

        changed, changes = storage.change(stored, leaf, axes.on_each_layer(new_mask, leaf, key, leaf.mask))
        return changed, changes._replace(num_grown=changes.num_dropped) if topology.keeps_counts else changes

    def keep_leaf(stored: Any, kept: Any, key: jax.Array) -> tuple[Any, Changes]:
        del kept, key
        zero = zero_like(stored, jnp.int32)
        return storage.keep(stored), Changes(zero, zero)

    def change_leaf(
        kind: tuple[Pattern, Axes], leaf: tuple[Any, Any], due: jax.Array, key: jax.Array
    ) -> tuple[Any, Changes]:
        return jax.lax.cond(due, functools.partial(rewire_leaf, kind), keep_leaf, *leaf, key)

    if topology.is_layerwise:
        due = optimizer.layers_due(step, len(stored)) & usable
        keys = jax.random.split(key, max(len(stored), 1))
        changed, changes = map_layers(change_leaf, kinds, list(zip(stored, kept, strict=True)), due, keys)
    else:
        leaves = [see(s, k) for s, k in zip(stored, kept, strict=True)]
        masks, topology_state = rewired_masks(topology, pruned, leaves, state.topology_state, step, key, usable)
        both = [storage.change(*each) for each in zip(stored, leaves, masks, strict=True)]
        changed = [new for new, _ in both]
        changes = jax.tree.map(lambda *counts: total(counts), *(counts for _, counts in both)) if both else None
        state = state._replace(
            topology_state=jax.tree.map(lambda n, o: jnp.where(usable, n, o), topology_state, state.topology_state)
        )
    made = usable.astype(jnp.int32)
    changes = Changes(made * 0, made * 0) if changes is None else changes
    return changed, state._replace(
        topology_key=jax.random.key_data(next_key),
        num_dropped=changes.num_dropped,
        num_grown=changes.num_grown,
        num_topology_updates=state.num_topology_updates + made,
        num_skipped_updates=state.num_skipped_updates + (1 - made),
    )


def rewired_masks(
    topology: Topology,
    pruned: Sequence[PrunedLeaf],
    leaves: Sequence[Layer],
    topology_state: Any,
    step: jax.Array,
    key: jax.Array,
    usable: jax.Array | bool = True,
) -> tuple[list[jax.Array], Any]:
    """The new mask of each leaf, and the new state, of a topology that needs all layers at once."""
    layers = [
        [(leaf.pattern, layer) for layer in leaf.axes.unstacked_layers(whole)]
        for leaf, whole in zip(pruned, leaves, strict=True)
    ]
    flat = [pair for of_leaf in layers for pair in of_leaf]
    units = [pattern.units(layer) for pattern, layer in flat]
    masks, topology_state = topology.rewire(units, topology_state, step, key)
    new_masks = iter(
        pattern.entries(jnp.where(usable, new, unit.mask), layer.mask)
        for new, unit, (pattern, layer) in zip(masks, units, flat, strict=True)
    )
    whole_masks = [
        leaf.axes.restacked([next(new_masks) for _ in of_leaf], whole.mask)
        for leaf, whole, of_leaf in zip(pruned, leaves, layers, strict=True)
    ]
    return whole_masks, topology_state


def all_finite(*trees: Any) -> jax.Array:
    """Whether every entry of every leaf is finite, as one bool; leaves of equal shape are looked at in one loop."""
    leaves = jax.tree.leaves(trees)

    def count(kind: None, leaf: jax.Array) -> tuple[tuple[()], jax.Array]:
        del kind
        return (), jnp.any(~jnp.isfinite(leaf)).astype(jnp.int32)

    _, number = map_layers(count, [None] * len(leaves), leaves)
    return jnp.asarray(True) if number is None else number == 0


def num_nonzero_inactive(masks: Any, params: optax.Params) -> jax.Array:
    """int32 []: the inactive weights that are not zero."""
    nodes = jax.tree.structure(params).flatten_up_to(masks)
    pairs = [(m, p) for m, p in zip(nodes, jax.tree.leaves(params), strict=True) if not is_masked(m)]

    def count(kind: None, pair: tuple[jax.Array, jax.Array]) -> tuple[tuple[()], jax.Array]:
        del kind
        mask, p = pair
        return (), jnp.sum((p != 0) & ~mask, dtype=jnp.int32)

    _, number = map_layers(count, [None] * len(pairs), pairs)
    return jnp.zeros((), jnp.int32) if number is None else number


def corrected_grads(grads: optax.Updates, inner_state: optax.OptState, extra_args: dict[str, Any]) -> optax.Updates:
    """The dense corrected gradient, from the inner state before the step."""
    states = find_corrections(inner_state)
    if len(states) != 1:
        raise ValueError(
            f"grow_by='corrected' needs exactly one correct_gradients inside the inner optimizer, found {len(states)}. "
            "Use grow_by='raw', or put agent_optax.correct_gradients into the chain."
        )
    return states[0].correct(grads, states[0].memory_state.recall(grads, extra_args))
