"""The active weights as compact storage holds them, and how it reads and writes the entries of a leaf."""

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

from agent_optax._tree import is_masked
from agent_optax.sparsity._matching import restructured
from agent_optax.sparsity._pruned_leaf import PrunedLeaf
from agent_optax.sparsity._state import large_total
from agent_optax.sparsity._storage import ActiveWeights
from agent_optax.sparsity.inner._like_params import map_like_params
from agent_optax.sparsity.selection._tiles import merge_last_axes, split_axis
from agent_optax.sparsity.storages._positions import num_positions, positions
from agent_optax.sparsity.storages._shards import Parts, as_rows, from_rows, parts_of, row_by_row
from agent_optax.sparsity.storages._sparse_update import entries_at, with_entries_added, with_entries_set

Shape = tuple[int, ...]


class _CompactFields(NamedTuple):
    indices: Any  # like params, int32 [nnz], sorted flat positions; MaskedNode where nothing is pruned
    point_indices: Any  # like indices: where the stored point of evaluation has its entries; None without such a memory
    is_uncorrected: Any  # like indices, bool: grown since that point was set; None without such a memory
    ever_active: Any  # like params, uint8 [*parts, ceil(size / 8)]: packed bits; None when the topology is static


class CompactActive(_CompactFields, ActiveWeights):
    """The active weights, as sorted flat positions.

    A leaf whose type says that it is split over devices has positions for each part, [*parts, capacity] in place of
    [nnz], so that gathers and scatters stay on a device. A part may come to hold all active weights of the leaf, and
    has room for that; the rest is padding, for which zeros are read and nothing is written.

    The inner optimizer gets the entries with as many axes as the parameter has, [1, ..., nnz] or [*parts[:-1],
    parts[-1] * capacity], because a weight decay mask or a label may look at the number of axes.
    """

    __slots__ = ()

    def masks(self, params: optax.Params) -> Any:
        """True where a weight is active."""
        own = restructured(params, self.indices)
        return jax.tree.map(lambda i, p: i if is_masked(i) else mask_at(i, p), self.indices, own, is_leaf=is_masked)

    def num_active(self) -> jax.Array:
        """The number of active weights."""
        return large_total(jax.tree.map(_num_active, self.indices))

    def num_ever_active(self) -> jax.Array:
        """The number of weights that were ever active."""
        if self.ever_active is None:
            return self.num_active()
        return large_total(
            jax.tree.map(lambda b: jnp.sum(jax.lax.population_count(b), dtype=jnp.int32), self.ever_active)
        )

    def gather(self, tree: Any) -> Any:
        """From dense parameters to active entries."""
        return jax.tree.map(
            lambda i, x: x if is_masked(i) else as_entries(rows_at(i, x), jnp.ndim(x)),
            self.indices,
            tree,
            is_leaf=is_masked,
        )

    def scatter_point(self, tree: Any, params: Any) -> Any:
        """From the entries of the stored point to dense parameters, zero where it has none."""
        return jax.tree.map(
            lambda i, v, p: v if is_masked(i) else scatter_rows(i, entry_rows(v, i), p),
            self.point_indices,
            tree,
            params,
            is_leaf=is_masked,
        )

    def step_args(
        self, grads: optax.Updates, params: optax.Params, extra_args: dict[str, Any]
    ) -> tuple[optax.Updates, dict[str, Any]]:
        """Active entries; weights grown since the last refresh have an old gradient of zero, and are not corrected."""
        args = map_like_params(self.gather, extra_args, params)
        if self.is_uncorrected is not None and args.get("old_grads") is not None:
            args["old_grads"] = jax.tree.map(
                lambda new, g: g if is_masked(new) else jnp.where(as_entries(new, g.ndim), jnp.zeros_like(g), g),
                self.is_uncorrected,
                args["old_grads"],
                is_leaf=is_masked,
            )
        return self.gather(grads), args

    def points_moved(self) -> CompactActive:
        """The stored point is the current parameters: all active weights are corrected from now on."""
        if self.point_indices is None:
            return self
        return self._replace(
            point_indices=self.indices, is_uncorrected=jax.tree.map(jnp.zeros_like, self.is_uncorrected)
        )


def as_entries(rows: jax.Array, num_axes: int) -> jax.Array:
    """[nnz] or [*parts, capacity] as the inner optimizer gets it, with the axes of the parameter."""
    return rows.reshape((1,) * (num_axes - 1) + rows.shape) if rows.ndim == 1 else merge_last_axes(rows)


def entry_rows(entries: jax.Array, indices: jax.Array) -> jax.Array:
    """The inverse of `as_entries`, shaped as `indices`."""
    return entries.reshape(indices.shape) if indices.ndim == 1 else split_axis(entries, -1, indices.shape[-1])


def entries_shape(indices: jax.Array, num_axes: int) -> Shape:
    """The shape of `as_entries`."""
    if indices.ndim == 1:
        return (1,) * (num_axes - 1) + indices.shape
    return (*indices.shape[:-2], indices.shape[-2] * indices.shape[-1])


def rows_at(indices: jax.Array, x: jax.Array) -> jax.Array:
    """The entries of x at these positions."""
    return entries_at(as_rows(jnp.asarray(x), indices.shape[:-1]), indices)


def scatter_rows(indices: jax.Array, values: jax.Array, like: jax.Array) -> jax.Array:
    """`values` at these positions of zeros in the shape of `like`."""
    zeros = as_rows(jnp.zeros_like(like, dtype=values.dtype), indices.shape[:-1])
    return from_rows(with_entries_added(zeros, indices, values), like)


def set_rows(indices: jax.Array, values: jax.Array, others: jax.Array) -> jax.Array:
    """`others` with `values` in its place at these positions."""
    return from_rows(with_entries_set(as_rows(others, indices.shape[:-1]), indices, values), others)


def mask_at(indices: jax.Array, like: jax.Array) -> jax.Array:
    """True at these positions of an array in the shape of `like`."""
    return set_rows(indices, jnp.ones_like(indices, dtype=bool), jnp.zeros_like(like, dtype=bool))


def take_places(x: jax.Array, places: jax.Array, num_axes: int) -> jax.Array:
    """`x[..., places]` of an array of the inner state, which may have axes in front of those of the parameter."""
    in_front = x.shape[: x.ndim - num_axes]
    if places.ndim > 1:
        take = row_by_row(lambda row, p: row[p], places.shape[:-1])
        for _ in in_front:
            take = jax.vmap(take, (0, None))
        return merge_last_axes(take(split_axis(x, -1, places.shape[-1]), places))
    rows = x.reshape(-1, places.shape[0])
    if not in_front:
        return rows[0][places].reshape(x.shape)
    # Row by row: a gather from the last axis makes XLA transpose the whole array.
    put = lambda j, rows: rows.at[j].set(rows[j][places])  # noqa: E731
    return jax.lax.fori_loop(0, rows.shape[0], put, rows).reshape(x.shape)


def _num_active(indices: jax.Array) -> int | jax.Array:
    return indices.shape[0] if indices.ndim == 1 else num_positions(indices)


def pack_bits(mask: jax.Array, parts: Parts) -> jax.Array:
    """uint8 [*parts, ceil(entries of a part / 8)]."""
    return jnp.packbits(as_rows(mask, parts), axis=-1)


def unpack_bits(bits: jax.Array, like: jax.Array) -> jax.Array:
    """The inverse, in the shape of `like`."""
    entries = like.size // math.prod(bits.shape[:-1])
    return from_rows(jnp.unpackbits(bits, axis=-1, count=entries).astype(bool), like)


def positions_of(packed: jax.Array, capacity: int) -> jax.Array:
    """The sorted positions of the set bits."""
    return row_by_row(functools.partial(positions, capacity=capacity), packed.shape[:-1])(packed)


def warn_if_gathered(params: optax.Params, pruned: Sequence[PrunedLeaf]) -> None:
    """Warns of a leaf that is split over devices without its type telling; outside `jit`, where that is known."""
    leaves = jax.tree.leaves(params)
    for leaf in pruned:
        x = leaves[leaf.index]
        is_known = isinstance(x, jax.Array) and not isinstance(x, Tracer)
        if is_known and not x.sharding.is_fully_replicated and not parts_of(x):
            warnings.warn(
                f"{leaf.name} is split over devices ({x.sharding}) under automatic sharding, which storage='compact' "
                "cannot see inside jax.jit: every step will gather its active entries on each device. Use a mesh with "
                "explicit axis types (jax.sharding.AxisType.Explicit), or storage='dense'.",
                stacklevel=4,
            )
