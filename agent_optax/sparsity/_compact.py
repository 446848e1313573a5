"""Compact storage: the inner optimizer sees one-dimensional arrays of the active entries only."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from agent_optax._tree import conform, is_masked
from agent_optax.sparsity._compact_active import CompactActive, has_point, mask_at, scatter_entries
from agent_optax.sparsity._compact_rewiring import compact_rewire
from agent_optax.sparsity._masked_update import TracedUpdate, leaf_of_each_state
from agent_optax.sparsity._rewiring import SparseOptimizer, when
from agent_optax.sparsity._sparse_update import SparseUpdate
from agent_optax.sparsity._state import SparsifyState


def check_compact(
    inner: optax.GradientTransformationExtraArgs,
    params: optax.Params,
    pruned: list[int],
    extra_args: dict[str, Any],
) -> None:
    """Raises ValueError unless `inner` treats the entries of the pruned leaves alike wherever they lie.

    Sums over entries are harmless: inactive entries would add nothing to them.
    """
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(jnp.shape(p), jnp.result_type(p)), params)
    inner_state = jax.eval_shape(inner.init, params)
    masks = jax.tree.unflatten(
        jax.tree.structure(params),
        [p if i in pruned else optax.MaskedNode() for i, p in enumerate(jax.tree.leaves(params))],
    )
    leaf_of_state = leaf_of_each_state(inner, inner_state, masks, params, exempt="point_fields")
    traced = TracedUpdate(inner, params, inner_state, params, extra_args)
    structured = traced.mixing(pruned, leaf_of_state).structured
    if structured:
        raise ValueError(
            'storage="compact" keeps active entries only, in one dimension, and needs an inner optimizer that treats '
            f'each entry alike; this one applies to whole parameters: {", ".join(structured)}. Use storage="dense".'
        )


def likely_extra_args(params: optax.Params) -> dict[str, Any]:
    """What updates of this library may be given, to look at an optimizer before its first step."""
    like = jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), jnp.result_type(p)), params)
    scalar = jnp.zeros((), jnp.float32)
    return {"value": scalar, "old_value": scalar, "old_grads": like, "batch_index": jnp.zeros((), jnp.int32)}


def compact_update(
    optimizer: SparseOptimizer,
    grads: optax.Updates,
    state: SparsifyState,
    params: optax.Params,
    extra_args: dict[str, Any],
) -> tuple[optax.Updates, SparsifyState]:
    """One step. `state.topology_step` already counts it."""
    inner = optimizer.inner
    active: CompactActive = state.active_weights
    positions = active.indices
    if not optimizer.topology.is_static:
        positions = _apart(positions, state.topology_step)
    gathered = {name: _gathered_like(arg, params, active) for name, arg in extra_args.items()}
    if active.is_uncorrected is not None and gathered.get("old_grads") is not None:
        # The mean gradient at a grown weight starts at zero; with an old gradient of zero it is not corrected.
        gathered["old_grads"] = jax.tree.map(
            lambda new, g: g if is_masked(new) else jnp.where(new, jnp.zeros_like(g), g),
            active.is_uncorrected,
            gathered["old_grads"],
            is_leaf=is_masked,
        )
    weights = active.gather(params)
    updates, inner_state = inner.update(active.gather(grads), state.inner_state, weights, **gathered)
    if has_point(inner_state, "moves_every_step"):
        active = active.points_moved()
    state = state._replace(inner_state=inner_state, active_weights=active)
    updates = jax.tree.map(lambda u, p: u.astype(p.dtype), updates, params)
    if not optimizer.topology.is_static:

        def body(carry: tuple[SparsifyState, Any, Any]) -> tuple[SparsifyState, Any, Any]:
            state, pruned, positions = carry
            new_positions = _apart(positions, state.topology_step)
            return (*compact_rewire(optimizer, state, pruned, params, grads), new_positions)

        pruned = jax.tree.map(lambda i, u: i if is_masked(i) else u, positions, updates, is_leaf=is_masked)
        # The positions of this step go through the loop beside those that it changes: see `_apart`.
        due = jnp.any(optimizer.layers_due(state.topology_step, len(jax.tree.leaves(positions))))
        state, pruned, positions = when(due, body, (state, pruned, positions))
        updates = jax.tree.map(lambda p, u: u if is_masked(p) else p, pruned, updates, is_leaf=is_masked)
    sparse = jax.tree.map(lambda i, u: u if is_masked(i) else SparseUpdate(i, u), positions, updates, is_leaf=is_masked)
    return sparse, state


def _apart(indices: Any, step: jax.Array) -> Any:
    """Equal indices, in arrays of their own.

    The update is at the old positions, also when a topology update has changed those in the state: the loop around it
    must leave them alone. XLA would copy them, one core copying twice, for it keeps old and new in one array until the
    end. That an addition adds zero it does not know: so the sum is one more array from the start, computed on all
    cores, and both go through the loop in place.
    """
    zero = jnp.minimum(step, 0)
    return jax.tree.map(lambda i: i + zero, indices)


def _gathered_like(arg: Any, params: optax.Params, active: CompactActive) -> Any:
    """The active entries of an extra argument shaped like `params`; any other argument as it is."""
    try:
        arg_like_params = conform(arg, params)  # an outer wrapper hides leaves of params, but not of extra arguments
        shapes, arg_shapes = (jax.tree.map(jnp.shape, tree) for tree in (params, arg_like_params))
    except (TypeError, ValueError):  # another tree
        return arg
    return active.gather(arg_like_params) if arg_shapes == shapes else arg


def as_dense_updates(updates: optax.Updates, params: optax.Params) -> optax.Updates:
    """Arrays like params, -p at inactive entries, as dense storage gives them."""

    def dense(update: Any, p: jax.Array) -> jax.Array:
        if not isinstance(update, SparseUpdate):
            return update
        return jnp.where(mask_at(update.indices, p), scatter_entries(update.indices, update.values, p), -p)

    return jax.tree.map(dense, updates, params, is_leaf=lambda node: isinstance(node, SparseUpdate))
