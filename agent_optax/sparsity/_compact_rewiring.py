"""A topology update under compact storage: the state at the new positions."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from agent_optax._tree import all_finite, is_masked
from agent_optax.sparsity._compact_active import (
    CompactActive,
    gather_entries,
    mask_at,
    pack_bits,
    positions_of,
    scatter_entries,
    take_places,
    unpack_bits,
)
from agent_optax.sparsity._masked_update import NO_LEAF, leaf_of_each_state
from agent_optax.sparsity._positions import num_positions, places
from agent_optax.sparsity._rewiring import Changed, LayerStorage, SparseOptimizer, rewired
from agent_optax.sparsity._selection import num_true
from agent_optax.sparsity._shards import row_by_row
from agent_optax.sparsity._state import SparsifyState
from agent_optax.sparsity._topology import Layer


def compact_rewire(
    optimizer: SparseOptimizer,
    state: SparsifyState,
    updates: optax.Updates,
    params: optax.Params,
    grads: optax.Updates,
) -> tuple[SparsifyState, optax.Updates]:
    """A topology update on the weights after this step: the state at the new positions, -p where one is dropped."""
    inner = optimizer.inner
    active: CompactActive = state.active_weights
    weights = active.gather(params)  # once more: an ordinary step may not need it
    new_weights = jax.tree.map(lambda u, w: w if is_masked(u) else w + u, updates, weights, is_leaf=is_masked)
    usable = all_finite((grads, new_weights))
    leaves = jax.tree.structure(params).flatten_up_to
    stored = [
        StoredLayer(*of_layer)
        for of_layer in zip(*map(leaves, (active.indices, weights, updates, grads, active.ever_active)), strict=True)
        if not is_masked(of_layer[0])
    ]
    patterns = optimizer.patterns(params, active.indices)[1]
    changed, state = rewired(optimizer, COMPACT_LAYERS, stored, patterns, usable, state)
    like = jax.tree.structure(active.indices)
    new = ChangedLayer(*(like.unflatten([layer[k] for layer in changed]) for k in range(len(ChangedLayer._fields))))

    fresh = inner.init(jax.tree.map(lambda v, w: w if is_masked(v) else v, new.weights, new_weights, is_leaf=is_masked))
    origins, survivors = leaves(new.origin), leaves(new.survives)
    leaf_of_state = leaf_of_each_state(inner, state.inner_state, active.indices, weights, exempt="point_fields")
    states, treedef = jax.tree.flatten(state.inner_state)
    for k, (i, start) in enumerate(zip(leaf_of_state, jax.tree.leaves(fresh), strict=True)):
        if i != NO_LEAF:
            states[k] = jnp.where(survivors[i], take_places(states[k], origins[i]), start)
    is_uncorrected = active.is_uncorrected
    if is_uncorrected is not None:
        is_uncorrected = jax.tree.map(lambda u, i, s: take_places(u, i) | ~s, is_uncorrected, new.origin, new.survives)
    active = active._replace(indices=new.indices, is_uncorrected=is_uncorrected, ever_active=new.ever_active)
    updates = jax.tree.map(lambda u, v: u if is_masked(v) else v, updates, new.updates, is_leaf=is_masked)
    return state._replace(inner_state=treedef.unflatten(states), active_weights=active), updates


class StoredLayer(NamedTuple):
    """What compact storage holds of a layer at a topology update."""

    indices: jax.Array  # int32 [nnz]
    weights: jax.Array  # [nnz], before the step
    updates: jax.Array  # [nnz]
    grads: jax.Array  # of the whole layer
    ever_active: jax.Array  # uint8, packed


class ChangedLayer(NamedTuple):
    """What becomes of it."""

    indices: jax.Array  # int32 [nnz]
    origin: jax.Array  # int32 [nnz]: the place at which a position stood before; anything for those that are new
    survives: jax.Array  # bool [nnz]: whether it stood anywhere
    weights: jax.Array  # [nnz], after the step
    updates: jax.Array  # [nnz], at the positions before: -p where a weight is dropped
    ever_active: jax.Array  # uint8, packed


def _see(stored: StoredLayer) -> Layer:
    indices = stored.indices
    mask = mask_at(indices, stored.grads)
    return Layer(
        weights=scatter_entries(indices, stored.weights + stored.updates, stored.grads),
        mask=mask,
        grads=stored.grads,
        ever_active=unpack_bits(stored.ever_active, mask),
        count=indices.shape[0] if indices.ndim == 1 else None,
    )


def _change(stored: StoredLayer, layer: Layer, mask: jax.Array) -> Changed:
    old, parts = stored.indices, stored.indices.shape[:-1]
    packed = pack_bits(mask, parts)
    indices = positions_of(packed, old.shape[-1])
    origin, survives = row_by_row(places, parts)(pack_bits(layer.mask, parts), indices)
    weights = take_places(stored.weights + stored.updates, origin)
    changed = ChangedLayer(
        indices=indices,
        origin=origin,
        survives=survives,
        weights=jnp.where(survives, weights, jnp.zeros_like(weights)),
        updates=jnp.where(gather_entries(old, mask), stored.updates, -stored.weights),
        ever_active=stored.ever_active | packed,
    )
    num_new = num_positions(indices) - num_true(survives)
    return Changed(changed, num_new, num_new)


def _keep(stored: StoredLayer) -> ChangedLayer:
    indices = stored.indices
    place = jax.lax.broadcasted_iota(jnp.int32, indices.shape, indices.ndim - 1)
    return ChangedLayer(
        indices=indices,
        origin=jnp.zeros_like(indices) + place,
        survives=jnp.ones_like(indices, dtype=bool),
        weights=stored.weights + stored.updates,
        updates=stored.updates,
        ever_active=stored.ever_active,
    )


COMPACT_LAYERS = LayerStorage(_see, _change, _keep)
