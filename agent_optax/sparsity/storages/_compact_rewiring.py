"""A topology update under compact storage: the state at the new positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from agent_optax._tree import is_masked, updated
from agent_optax.sparsity._equal_layers import map_layers
from agent_optax.sparsity._layer import Layer
from agent_optax.sparsity._pruned_leaf import PrunedLeaf
from agent_optax.sparsity._rewiring import Changes, LeafStorage, all_finite, rewired
from agent_optax.sparsity._sparse_optimizer import SparseOptimizer
from agent_optax.sparsity._state import SparsifyState
from agent_optax.sparsity.inner._state_arrays import NO_LEAF, leaf_of_each_state
from agent_optax.sparsity.selection._top_k import num_true
from agent_optax.sparsity.storages._compact_active import (
    CompactActive,
    as_entries,
    mask_at,
    pack_bits,
    positions_of,
    rows_at,
    scatter_rows,
    take_places,
    unpack_bits,
)
from agent_optax.sparsity.storages._positions import num_positions, places
from agent_optax.sparsity.storages._shards import row_by_row


def compact_rewire(
    optimizer: SparseOptimizer,
    pruned: Sequence[PrunedLeaf],
    state: SparsifyState,
    updates: Any,
    params: optax.Params,
    grads: optax.Updates,
) -> tuple[SparsifyState, Any]:
    """A topology update on the weights after this step: the state at the new positions, -p where one is dropped.

    `updates` has the rows of the pruned leaves, MaskedNode elsewhere.
    """
    inner = optimizer.inner
    active: CompactActive = state.active_weights
    structure = jax.tree.structure(params)
    columns = [structure.flatten_up_to(tree) for tree in (active.indices, params, updates, grads, active.ever_active)]
    stored = [StoredLayer(*(column[leaf.index] for column in columns)) for leaf in pruned]
    _, (num_not_finite, num_nonzero_inactive) = map_layers(_looked_at, [None] * len(stored), stored)
    usable = all_finite(grads) & (num_not_finite == 0)
    state = state._replace(num_nonzero_inactive=num_nonzero_inactive)
    changed, state = rewired(optimizer, _LAYERS, pruned, stored, usable, state)
    like = jax.tree.structure(active.indices)
    new = ChangedLayer(*(like.unflatten([layer[k] for layer in changed]) for k in range(len(ChangedLayer._fields))))

    num_axes = [jnp.ndim(p) for p in jax.tree.leaves(params)]
    new_weights = jax.tree.map(
        lambda v, p: p if is_masked(v) else as_entries(v.astype(p.dtype), p.ndim),
        new.weights,
        params,
        is_leaf=is_masked,
    )
    fresh = jax.tree.leaves(inner.init(new_weights))
    origins, survivors = structure.flatten_up_to(new.origin), structure.flatten_up_to(new.survives)
    leaf_of_state = leaf_of_each_state(inner, state.inner_state, new_weights, exempt="point_fields")
    arrays, treedef = jax.tree.flatten(state.inner_state)
    for k, i in enumerate(leaf_of_state):
        if i != NO_LEAF and not is_masked(survivors[i]):
            moved = take_places(arrays[k], origins[i], num_axes[i])
            arrays[k] = jnp.where(as_entries(survivors[i], num_axes[i]), moved, fresh[k])
    is_uncorrected = active.is_uncorrected
    if is_uncorrected is not None:
        is_uncorrected = jax.tree.map(lambda u, i, s: _take(u, i) | ~s, is_uncorrected, new.origin, new.survives)
    active = active._replace(indices=new.indices, is_uncorrected=is_uncorrected, ever_active=new.ever_active)
    return state._replace(inner_state=treedef.unflatten(arrays), active_weights=active), new.updates


def _take(rows: jax.Array, places: jax.Array) -> jax.Array:
    return row_by_row(lambda row, p: row[p], places.shape[:-1])(rows, places)


class StoredLayer(NamedTuple):
    """What compact storage holds of a layer at a topology update; rows are [nnz] or [*parts, capacity]."""

    indices: jax.Array  # int32, rows
    params: jax.Array  # of the whole layer, before the step
    updates: jax.Array  # rows
    grads: jax.Array  # of the whole layer
    ever_active: jax.Array  # uint8, packed


class ChangedLayer(NamedTuple):
    """What becomes of it."""

    indices: jax.Array  # int32, rows
    origin: jax.Array  # int32, rows: the place at which a position was before; anything for those that are new
    survives: jax.Array  # bool, rows: whether it had a place before
    weights: jax.Array  # rows, after the step
    updates: jax.Array  # rows, at the positions before: -p where a weight is dropped
    ever_active: jax.Array  # uint8, packed


def _looked_at(kind: None, stored: StoredLayer) -> tuple[tuple[()], tuple[jax.Array, jax.Array]]:
    """Counts: whether a weight is not finite after the step, and the inactive weights that are not zero."""
    del kind
    not_finite = jnp.any(~jnp.isfinite(_new_weights(stored))).astype(jnp.int32)
    active = rows_at(stored.indices, stored.params)
    return (), (not_finite, num_true(stored.params != 0) - num_true(active != 0))


def _new_weights(stored: StoredLayer) -> jax.Array:
    return updated(rows_at(stored.indices, stored.params), stored.updates)


def _see(stored: StoredLayer) -> Layer:
    indices = stored.indices
    mask = mask_at(indices, stored.grads)
    return Layer(
        weights=scatter_rows(indices, _new_weights(stored), stored.grads),
        mask=mask,
        grads=stored.grads,
        ever_active=unpack_bits(stored.ever_active, mask),
        count=indices.shape[0] if indices.ndim == 1 else None,
    )


def _change(stored: StoredLayer, layer: Layer, mask: jax.Array) -> tuple[ChangedLayer, Changes]:
    old, parts = stored.indices, stored.indices.shape[:-1]
    packed = pack_bits(mask, parts)
    indices = positions_of(packed, old.shape[-1])
    origin, survives = row_by_row(places, parts)(pack_bits(layer.mask, parts), indices)
    weights = _take(_new_weights(stored), origin)
    step_back = -rows_at(old, stored.params).astype(stored.updates.dtype)
    changed = ChangedLayer(
        indices=indices,
        origin=origin,
        survives=survives,
        weights=jnp.where(survives, weights, jnp.zeros_like(weights)),
        updates=jnp.where(rows_at(old, mask), stored.updates, step_back),
        ever_active=stored.ever_active | packed,
    )
    num_new = num_positions(indices) - num_true(survives)
    return changed, Changes(num_new, num_new)


def _keep(stored: StoredLayer) -> ChangedLayer:
    indices = stored.indices
    place = jax.lax.broadcasted_iota(jnp.int32, indices.shape, indices.ndim - 1)
    return ChangedLayer(
        indices=indices,
        origin=jnp.zeros_like(indices) + place,
        survives=jnp.ones_like(indices, dtype=bool),
        weights=_new_weights(stored),
        updates=stored.updates,
        ever_active=stored.ever_active,
    )


_LAYERS = LeafStorage(_see, _change, _keep)
