"""Compact storage: the inner optimizer sees one-dimensional arrays of the active entries only."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from agent_optax._tree import all_finite, conform, is_masked
from agent_optax.sparsity._masked_update import NO_LEAF, TracedUpdate, leaf_of_each_state
from agent_optax.sparsity._positions import num_positions, places, positions
from agent_optax.sparsity._rewiring import Changed, LayerStorage, SparseOptimizer, rewired, when
from agent_optax.sparsity._selection import num_true
from agent_optax.sparsity._shards import Parts, as_rows, from_rows, parts_of, row_by_row
from agent_optax.sparsity._sparse_update import SparseUpdate, entries_at, with_entries_added, with_entries_set
from agent_optax.sparsity._state import SparsifyState, total
from agent_optax.sparsity._topology import Layer


class CompactActive(NamedTuple):
    """The active weights, as sorted flat positions; MaskedNode where nothing is pruned.

    A leaf whose type says that it is split over devices has positions for each part, [*parts, capacity] in place of
    [nnz], so that gathers and scatters stay on a device. A part may come to hold all active weights of the leaf, and
    has room for that; the rest is padding, for which zeros are read and nothing is written.
    """

    indices: Any  # like params, int32 [nnz]
    point_indices: Any  # like indices: where the stored point of evaluation has its entries; None without such a memory
    is_uncorrected: Any  # like indices, bool: grown since that point was set; None without such a memory
    ever_active: Any  # like params, uint8 [*parts, ceil(size / 8)]: packed bits; None when the topology is static

    def masks(self, params: optax.Params) -> Any:
        """True where a weight is active."""
        return jax.tree.map(
            lambda i, p: i if is_masked(i) else _mask(i, p),
            self.indices,
            params,
            is_leaf=is_masked,
        )

    def num_active(self) -> jax.Array:
        """The number of active weights."""
        return total(jax.tree.map(_num_active, self.indices))

    def num_ever_active(self) -> jax.Array:
        """The number of weights that were ever active."""
        if self.ever_active is None:
            return self.num_active()
        return total(jax.tree.map(lambda b: jnp.sum(jax.lax.population_count(b), dtype=jnp.int32), self.ever_active))

    def gather(self, tree: Any) -> Any:
        """From dense parameters to active entries."""
        return jax.tree.map(lambda i, x: x if is_masked(i) else _gather(i, x), self.indices, tree, is_leaf=is_masked)

    def scatter_point(self, tree: Any, params: Any) -> Any:
        """From the entries of the stored point to dense parameters, zero where it has none."""
        return jax.tree.map(
            lambda i, v, p: v if is_masked(i) else _scatter(i, v, p),
            self.point_indices,
            tree,
            params,
            is_leaf=is_masked,
        )

    def points_moved(self) -> CompactActive:
        """The stored point is the current parameters: all active weights are corrected from now on."""
        if self.point_indices is None:
            return self
        return self._replace(
            point_indices=self.indices, is_uncorrected=jax.tree.map(jnp.zeros_like, self.is_uncorrected)
        )


def _gather(indices: jax.Array, x: jax.Array) -> jax.Array:
    """The entries of x at these positions."""
    return entries_at(as_rows(jnp.asarray(x), indices.shape[:-1]), indices)


def _scatter(indices: jax.Array, values: jax.Array, like: jax.Array) -> jax.Array:
    """`values` at these positions of zeros in the shape of `like`."""
    zeros = as_rows(jnp.zeros_like(like, dtype=values.dtype), indices.shape[:-1])
    return from_rows(with_entries_added(zeros, indices, values), like)


def _mask(indices: jax.Array, like: jax.Array) -> jax.Array:
    """True at these positions of an array in the shape of `like`."""
    zeros = as_rows(jnp.zeros_like(like, dtype=bool), indices.shape[:-1])
    return from_rows(with_entries_set(zeros, indices, jnp.ones_like(indices, dtype=bool)), like)


def _take(x: jax.Array, places: jax.Array) -> jax.Array:
    """`x[..., places]`, row by row: a gather from the last axis makes XLA turn the whole array at every step."""
    parts = places.shape[:-1]
    take = row_by_row(lambda row, p: row[p], parts)
    if x.ndim == places.ndim:
        return take(x, places)
    if parts:
        for _ in range(x.ndim - places.ndim):
            take = jax.vmap(take, (0, None))
        return take(x, places)
    rows = x.reshape(-1, x.shape[-1])
    return jax.lax.fori_loop(0, rows.shape[0], lambda j, r: r.at[j].set(r[j][places]), rows).reshape(x.shape)


def _num_active(indices: jax.Array) -> int | jax.Array:
    return indices.shape[0] if indices.ndim == 1 else num_positions(indices)


def _pack(mask: jax.Array, parts: Parts) -> jax.Array:
    return jnp.packbits(as_rows(mask, parts), axis=-1)


def _unpack(bits: jax.Array, like: jax.Array) -> jax.Array:
    entries = like.size // math.prod(bits.shape[:-1])
    return from_rows(jnp.unpackbits(bits, axis=-1, count=entries).astype(bool), like)


def compact_start(masks: Any, is_static: bool, counts: Any) -> CompactActive:
    """The positions of the masks; `counts` holds their numbers of active weights."""
    packed = jax.tree.map(lambda mask: _pack(mask, parts_of(mask)), masks)
    return CompactActive(
        indices=jax.tree.map(
            lambda bits, mask, count: _positions(bits, min(count, mask.size // math.prod(bits.shape[:-1]))),
            packed,
            masks,
            counts,
        ),
        point_indices=None,
        is_uncorrected=None,
        ever_active=None if is_static else packed,
    )


def _positions(packed: jax.Array, capacity: int) -> jax.Array:
    return row_by_row(functools.partial(positions, capacity=capacity), packed.shape[:-1])(packed)


def warn_if_gathered(params: optax.Params, masks: Any, names: Sequence[str]) -> None:
    """Warns of a leaf that is split over devices without its type telling; outside `jit`, where that is known."""
    leaves, treedef = jax.tree.flatten(params)
    pruned = [leaf for leaf, mask in zip(leaves, treedef.flatten_up_to(masks), strict=True) if not is_masked(mask)]
    for name, leaf in zip(names, pruned, strict=True):
        is_known = isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer)
        if is_known and not leaf.sharding.is_fully_replicated and not parts_of(leaf):
            warnings.warn(
                f"{name} is split over devices ({leaf.sharding}) under automatic sharding, which storage='compact' "
                "cannot see inside jax.jit: every step will gather its active entries on each device. Use a mesh with "
                "explicit axis types (jax.sharding.AxisType.Explicit), or storage='dense'.",
                stacklevel=3,
            )


def follow_points(active: CompactActive, inner_state: optax.OptState) -> CompactActive:
    """Makes room for the positions of stored points, if a memory in the inner state stores one."""
    if not has_point(inner_state, "point_fields"):
        return active
    return active._replace(
        point_indices=jax.tree.map(jnp.copy, active.indices),
        is_uncorrected=jax.tree.map(lambda i: jnp.zeros_like(i, dtype=bool), active.indices),
    )


def has_point(inner_state: optax.OptState, method: str) -> bool:
    leaves = jax.tree.leaves(inner_state, is_leaf=lambda node: hasattr(node, method))
    return any(hasattr(node, method) for node in leaves)


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
            return (*_rewire(optimizer, state, pruned, params, grads), new_positions)

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
        return jnp.where(_mask(update.indices, p), _scatter(update.indices, update.values, p), -p)

    return jax.tree.map(dense, updates, params, is_leaf=lambda node: isinstance(node, SparseUpdate))


def _rewire(
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
            states[k] = jnp.where(survivors[i], _take(states[k], origins[i]), start)
    is_uncorrected = active.is_uncorrected
    if is_uncorrected is not None:
        is_uncorrected = jax.tree.map(lambda u, i, s: _take(u, i) | ~s, is_uncorrected, new.origin, new.survives)
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
    mask = _mask(indices, stored.grads)
    return Layer(
        weights=_scatter(indices, stored.weights + stored.updates, stored.grads),
        mask=mask,
        grads=stored.grads,
        ever_active=_unpack(stored.ever_active, mask),
        count=indices.shape[0] if indices.ndim == 1 else None,
    )


def _change(stored: StoredLayer, layer: Layer, mask: jax.Array) -> Changed:
    old, parts = stored.indices, stored.indices.shape[:-1]
    packed = _pack(mask, parts)
    indices = _positions(packed, old.shape[-1])
    origin, survives = row_by_row(places, parts)(_pack(layer.mask, parts), indices)
    weights = _take(stored.weights + stored.updates, origin)
    changed = ChangedLayer(
        indices=indices,
        origin=origin,
        survives=survives,
        weights=jnp.where(survives, weights, jnp.zeros_like(weights)),
        updates=jnp.where(_gather(old, mask), stored.updates, -stored.weights),
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
