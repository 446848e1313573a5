"""Dense storage: the inner optimizer holds whole arrays, and sees zero gradients where weights are inactive."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from agent_optax._tree import is_masked
from agent_optax.correction._find import find_corrections
from agent_optax.sparsity._layer import Layer
from agent_optax.sparsity._pruned_leaf import PrunedLeaf
from agent_optax.sparsity._rewiring import (
    Changes,
    LeafStorage,
    all_finite,
    corrected_grads,
    num_nonzero_inactive,
    rewired,
    when,
)
from agent_optax.sparsity._sparse_optimizer import SparseOptimizer
from agent_optax.sparsity._start import Start
from agent_optax.sparsity._state import SparsifyState, apply_masks, large_total
from agent_optax.sparsity._storage import ActiveWeights, Storage
from agent_optax.sparsity.inner._like_params import map_like_params
from agent_optax.sparsity.inner._state_arrays import NO_LEAF
from agent_optax.sparsity.inner._traits import Traits
from agent_optax.sparsity.selection._top_k import num_true

BEFORE, NOW = 1, 2  # bits of `activity`: active before the latest topology update, and since


class _DenseFields(NamedTuple):
    activity: Any  # like params, uint8: the bits BEFORE and NOW; MaskedNode where nothing is pruned
    ever_active: Any  # like params, bool: active at any time so far; None when the topology is static


class DenseActive(_DenseFields, ActiveWeights):
    """The active weights, as arrays of the shape of their parameter."""

    __slots__ = ()

    def with_bits(self, bits: int | jax.Array) -> Any:
        """True where all of these bits are set."""
        return jax.tree.map(lambda a: (a & jnp.asarray(bits, a.dtype)) == jnp.asarray(bits, a.dtype), self.activity)

    def masks(self, params: optax.Params | None = None) -> Any:
        """True where a weight is active."""
        del params
        return self.with_bits(NOW)

    def num_active(self) -> jax.Array:
        """The number of active weights."""
        return large_total(jax.tree.map(lambda m: jnp.sum(m, dtype=jnp.int32), self.masks()))

    def num_ever_active(self) -> jax.Array:
        """The number of weights that were ever active."""
        if self.ever_active is None:
            return self.num_active()
        return large_total(jax.tree.map(lambda m: jnp.sum(m, dtype=jnp.int32), self.ever_active))

    def step_args(
        self, grads: optax.Updates, params: optax.Params, extra_args: dict[str, Any]
    ) -> tuple[optax.Updates, dict[str, Any]]:
        """Zeros where weights are inactive, and the masks."""
        masks = self.masks()
        grads, extra_args = _restricted(masks, grads, params, extra_args)
        return grads, {**extra_args, "active_masks": masks}


class Dense(Storage):
    """See `sparsify`: ``storage="dense"``."""

    def start(
        self, optimizer: SparseOptimizer, start: Start, params: optax.Params, key: jax.Array
    ) -> tuple[DenseActive, optax.OptState]:
        """All active weights are as if they had always been."""
        del key
        activity = jax.tree.map(lambda m: _bit(m, BEFORE | NOW), start.masks)
        active = DenseActive(activity, None if optimizer.topology.is_static else start.masks)
        return active, optimizer.inner.init(apply_masks(start.masks, params))

    def update(
        self,
        optimizer: SparseOptimizer,
        grads: optax.Updates,
        state: SparsifyState,
        params: optax.Params,
        extra_args: dict[str, Any],
    ) -> tuple[optax.Updates, SparsifyState]:
        """One step.

        A topology update, if due, comes first, on a step that it computes for itself: so an ordinary step keeps nothing
        for it. The states of weights that it drops or grows start again; see `_when_to_reset`.
        """
        inner, is_static = optimizer.inner, optimizer.topology.is_static
        pruned = optimizer.pruned_leaves(params, state.active_weights.activity)
        if find_corrections(state.inner_state):
            extra_args = {**extra_args, "active_masks": state.active_weights.masks()}
        traits = optimizer.traits(grads, params, extra_args, pruned, exempt="dense_fields")
        old_state = state.inner_state

        def step(masks: Any, inner_state: optax.OptState) -> tuple[optax.Updates, optax.OptState]:
            seen, args = _restricted(masks, grads, params, extra_args)
            return inner.update(seen, inner_state, params, **args)

        def rewire(state: SparsifyState) -> SparsifyState:
            masks = state.active_weights.masks()
            updates, _ = step(masks, old_state)
            new_params = optax.apply_updates(params, _masked_updates(masks, updates, params))
            growth_grads = corrected_grads(grads, old_state, extra_args) if optimizer.grow_by == "corrected" else grads
            state = state._replace(num_nonzero_inactive=num_nonzero_inactive(masks, params))
            return _rewired(optimizer, pruned, state, new_params, growth_grads, all_finite(grads, new_params))

        due = jnp.any(optimizer.layers_due(state.topology_step, len(pruned)))
        if not is_static:
            state = when(due, rewire, state._replace(inner_state=None))
        active = state.active_weights
        before = active.with_bits(NOW if is_static else jnp.where(due, BEFORE, NOW))
        kept = active.with_bits(NOW if is_static else jnp.where(due, BEFORE | NOW, NOW))

        first, after = _when_to_reset(traits, is_static)
        fresh = inner.init(apply_masks(kept, params))
        inner_state = _reset(old_state, fresh, first, traits, kept, params)
        updates, inner_state = step(kept if traits.is_independent else before, inner_state)
        inner_state = _reset(inner_state, fresh, after, traits, kept, params)
        return _masked_updates(kept, updates, params), state._replace(inner_state=inner_state)


def _restricted(
    masks: Any, grads: optax.Updates, params: optax.Params, extra_args: dict[str, Any]
) -> tuple[optax.Updates, dict[str, Any]]:
    """Zeros where weights are inactive, in the gradient and in each extra argument that is a tree like params."""
    return apply_masks(masks, grads), map_like_params(lambda tree: apply_masks(masks, tree), extra_args, params)


def _when_to_reset(traits: Traits, is_static: bool) -> tuple[set[int], set[int]]:
    """The arrays of the inner state to reset before a step, and those to reset after it, where a weight is not kept.

    A state that is at rest stays at its initial value where a weight is inactive, so only a topology update changes
    that. Where entries are independent of each other it is then the same to reset before the step as after it, and it
    spares a copy: XLA would otherwise compute the new state twice, once as it is for the update. Under an optimizer
    that mixes entries, a weight dropped in this step still has a part in it.
    """
    own = {k for k, i in enumerate(traits.leaf_of_state) if i != NO_LEAF}
    resting = {k for k in own if traits.is_at_rest[k]}
    if is_static:
        return set(), own - resting
    return (resting, own - resting) if traits.is_independent else (set(), own)


def _reset(
    inner_state: optax.OptState,
    fresh: optax.OptState,
    numbers: set[int],
    traits: Traits,
    kept: Any,
    params: optax.Params,
) -> optax.OptState:
    """The state with the initial values in the arrays of these numbers, where a weight is not kept."""
    masks = jax.tree.structure(params).flatten_up_to(kept)
    arrays, treedef = jax.tree.flatten(inner_state)
    initial = jax.tree.leaves(fresh)
    for k in numbers:
        arrays[k] = jnp.where(masks[traits.leaf_of_state[k]], arrays[k], initial[k])
    return treedef.unflatten(arrays)


def _masked_updates(masks: Any, updates: optax.Updates, params: optax.Params) -> optax.Updates:
    """The update where the mask is True, -p elsewhere."""

    def masked(mask: Any, u: jax.Array, p: jax.Array) -> jax.Array:
        return u if is_masked(mask) else jnp.where(mask, u, -p.astype(u.dtype))

    return jax.tree.map(masked, masks, updates, params, is_leaf=is_masked)


def _rewired(
    optimizer: SparseOptimizer,
    pruned: list[PrunedLeaf],
    state: SparsifyState,
    weights: optax.Params,
    grads: optax.Updates,
    usable: jax.Array,
) -> SparsifyState:
    """The state after a topology update."""
    active = state.active_weights
    structure = jax.tree.structure(weights)
    columns = [structure.flatten_up_to(tree) for tree in (active.activity, active.ever_active, weights, grads)]
    stored = [_StoredLayer(*(column[leaf.index] for column in columns)) for leaf in pruned]
    changed, state = rewired(optimizer, _LAYERS, pruned, stored, usable, state)
    like = jax.tree.structure(active.activity)
    return state._replace(active_weights=DenseActive(*(like.unflatten([new[k] for new in changed]) for k in range(2))))


class _StoredLayer(NamedTuple):
    activity: jax.Array
    ever_active: jax.Array
    weights: jax.Array  # after the step
    grads: jax.Array


def _see(stored: _StoredLayer) -> Layer:
    return Layer(stored.weights, (stored.activity & NOW) != 0, stored.grads, stored.ever_active)


def _change(stored: _StoredLayer, layer: Layer, mask: jax.Array) -> tuple[tuple[jax.Array, jax.Array], Changes]:
    activity = _bit(layer.mask, BEFORE) | _bit(mask, NOW)
    changes = Changes(num_true(layer.mask & ~mask), num_true(mask & ~layer.mask))
    return (activity, stored.ever_active | mask), changes


def _keep(stored: _StoredLayer) -> tuple[jax.Array, jax.Array]:
    return _bit((stored.activity & NOW) != 0, BEFORE | NOW), stored.ever_active


def _bit(mask: jax.Array, bit: int) -> jax.Array:
    return jnp.where(mask, jnp.uint8(bit), jnp.uint8(0))


_LAYERS = LeafStorage(_see, _change, _keep)
