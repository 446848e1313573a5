"""Dense storage: the inner optimizer sees whole arrays, and inactive entries are held at zero."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from agent_optax._tree import all_finite, is_masked
from agent_optax.sparsity._masked_update import NO_LEAF, TracedUpdate, leaf_of_each_state
from agent_optax.sparsity._rewiring import Changed, LayerStorage, SparseOptimizer, corrected_grads, rewired, when
from agent_optax.sparsity._selection import num_true
from agent_optax.sparsity._state import SparsifyState, apply_masks, total
from agent_optax.sparsity._topology import Layer

INACTIVE, NEW, ACTIVE = 0, 1, 2  # NEW: grown in the latest topology update


class DenseActive(NamedTuple):
    """The active weights, as arrays of the shape of their parameter; MaskedNode where nothing is pruned."""

    activity: Any  # like params, uint8: INACTIVE, NEW or ACTIVE
    ever_active: Any  # like params, bool: active at any time so far; None when the topology is static

    def masks(self, params: optax.Params | None = None) -> Any:
        """True where a weight is active."""
        del params
        return jax.tree.map(lambda a: a > INACTIVE, self.activity)

    def num_active(self) -> jax.Array:
        """The number of active weights."""
        return total(jax.tree.map(lambda m: jnp.sum(m, dtype=jnp.int32), self.masks()))

    def num_ever_active(self) -> jax.Array:
        """The number of weights that were ever active."""
        if self.ever_active is None:
            return self.num_active()
        return total(jax.tree.map(lambda m: jnp.sum(m, dtype=jnp.int32), self.ever_active))

    def gather(self, tree: Any) -> Any:
        """Corrections store whole arrays."""
        return tree

    def scatter_point(self, tree: Any, params: Any) -> Any:
        """Corrections store whole arrays."""
        del params
        return tree

    def points_moved(self) -> DenseActive:
        """Nothing to follow."""
        return self


def dense_start(masks: Any, is_static: bool) -> DenseActive:
    """All active weights are as if they had always been."""
    activity = jax.tree.map(lambda m: jnp.where(m, ACTIVE, INACTIVE).astype(jnp.uint8), masks)
    return DenseActive(activity, None if is_static else masks)


def dense_update(
    optimizer: SparseOptimizer,
    grads: optax.Updates,
    state: SparsifyState,
    params: optax.Params,
    extra_args: dict[str, Any],
) -> tuple[optax.Updates, SparsifyState]:
    """One step. `state.topology_step` already counts it."""
    inner, topology = optimizer.inner, optimizer.topology
    masks = state.active_masks(params)
    given = extra_args
    extra_args = {**given, "active_masks": masks}
    leaf_of_state = leaf_of_each_state(inner, state.inner_state, masks, params, exempt="dense_fields")
    traced = TracedUpdate(inner, grads, state.inner_state, params, extra_args)
    structure = jax.tree.structure(params)  # parameters that an outer wrapper hides are no leaves of it
    pruned = [i for i, m in enumerate(structure.flatten_up_to(masks)) if not is_masked(m)]
    is_entrywise = traced.mixing(pruned, leaf_of_state).is_entrywise()
    if not is_entrywise:  # what happens at inactive entries reaches the others: they must see zeros
        traced = TracedUpdate(inner, apply_masks(masks, grads), state.inner_state, params, extra_args)

    due = jnp.any(optimizer.layers_due(state.topology_step, len(pruned)))
    active = state.active_weights
    if not topology.is_static:

        def body(carried: SparsifyState) -> SparsifyState:
            return _rewire(optimizer, carried, state.inner_state, grads, params, given, is_entrywise)

        carried = when(due, body, state._replace(inner_state=None))
        active = carried.active_weights
        state = carried._replace(inner_state=state.inner_state)

    # Dropped and inactive weights are INACTIVE; weights grown at this very step are NEW and start at the next one.
    threshold = jnp.where(due, NEW, INACTIVE).astype(jnp.uint8)
    kept = jax.tree.map(lambda a: a > threshold, active.activity)
    kept_leaves = structure.flatten_up_to(kept)
    fresh = jax.tree.leaves(inner.init(apply_masks(kept, params)))

    def hold(k: int, new: jax.Array) -> jax.Array:
        i = leaf_of_state[k]
        return new if i == NO_LEAF else jnp.where(kept_leaves[i], new, fresh[k])

    updates, inner_state = traced.evaluate(hold if is_entrywise else None)
    if not is_entrywise:
        leaves, treedef = jax.tree.flatten(inner_state)
        inner_state = treedef.unflatten([hold(k, leaf) for k, leaf in enumerate(leaves)])
    return _masked_updates(kept, updates, params), state._replace(inner_state=inner_state)


def _masked_updates(kept: Any, updates: optax.Updates, params: optax.Params) -> optax.Updates:
    """The update where a weight stays active, -p elsewhere, in the parameter's dtype."""

    def masked(mask: Any, u: jax.Array, p: jax.Array) -> jax.Array:
        return u if is_masked(mask) else jnp.where(mask, u.astype(p.dtype), -p)

    return jax.tree.map(masked, kept, updates, params, is_leaf=is_masked)


def _rewire(
    optimizer: SparseOptimizer,
    carried: SparsifyState,
    inner_state: optax.OptState,
    grads: optax.Updates,
    params: optax.Params,
    extra_args: dict[str, Any],
    is_entrywise: bool,
) -> SparsifyState:
    """A topology update on the weights after this step, which is computed here once more: ordinary steps do not pay."""
    inner = optimizer.inner
    masks = carried.active_masks(params)
    seen = grads if is_entrywise else apply_masks(masks, grads)
    updates, _ = inner.update(seen, inner_state, params, active_masks=masks, **extra_args)
    new_params = optax.apply_updates(params, _masked_updates(masks, updates, params))
    growth_grads = corrected_grads(grads, inner_state, extra_args) if optimizer.grow_by == "corrected" else grads
    usable = all_finite((grads, new_params))
    leaves = jax.tree.structure(params).flatten_up_to
    active = carried.active_weights
    stored = [
        of_layer
        for of_layer in zip(*map(leaves, (active.activity, active.ever_active, new_params, growth_grads)), strict=True)
        if not is_masked(of_layer[0])
    ]
    changed, carried = rewired(optimizer, DENSE_LAYERS, stored, optimizer.patterns(params, masks)[1], usable, carried)
    activity, ever_active = (jax.tree.structure(masks).unflatten([new[k] for new in changed]) for k in range(2))
    return carried._replace(active_weights=DenseActive(activity, ever_active))


def _see(stored: Any) -> Layer:
    activity, ever_active, weights, grads = stored
    return Layer(weights, activity > INACTIVE, grads, ever_active)


def _change(stored: Any, layer: Layer, mask: jax.Array) -> Changed:
    _, ever_active, *_ = stored
    activity = jnp.where(mask, jnp.where(layer.mask, ACTIVE, NEW), INACTIVE).astype(jnp.uint8)
    return Changed((activity, ever_active | mask), num_true(layer.mask & ~mask), num_true(mask & ~layer.mask))


def _keep(stored: Any) -> tuple[jax.Array, jax.Array]:
    activity, ever_active, *_ = stored
    return jnp.where(activity > INACTIVE, ACTIVE, INACTIVE).astype(jnp.uint8), ever_active


DENSE_LAYERS = LayerStorage(_see, _change, _keep)
