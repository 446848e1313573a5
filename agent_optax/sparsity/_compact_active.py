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
from agent_optax.sparsity._positions import num_positions, positions
from agent_optax.sparsity._shards import Parts, as_rows, from_rows, parts_of, row_by_row
from agent_optax.sparsity._sparse_update import entries_at, with_entries_added, with_entries_set
from agent_optax.sparsity._state import total


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
            lambda i, p: i if is_masked(i) else mask_at(i, p),
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
        return jax.tree.map(
            lambda i, x: x if is_masked(i) else gather_entries(i, x), self.indices, tree, is_leaf=is_masked
        )

    def scatter_point(self, tree: Any, params: Any) -> Any:
        """From the entries of the stored point to dense parameters, zero where it has none."""
        return jax.tree.map(
            lambda i, v, p: v if is_masked(i) else scatter_entries(i, v, p),
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


def gather_entries(indices: jax.Array, x: jax.Array) -> jax.Array:
    """The entries of x at these positions."""
    return entries_at(as_rows(jnp.asarray(x), indices.shape[:-1]), indices)


def scatter_entries(indices: jax.Array, values: jax.Array, like: jax.Array) -> jax.Array:
    """`values` at these positions of zeros in the shape of `like`."""
    zeros = as_rows(jnp.zeros_like(like, dtype=values.dtype), indices.shape[:-1])
    return from_rows(with_entries_added(zeros, indices, values), like)


def mask_at(indices: jax.Array, like: jax.Array) -> jax.Array:
    """True at these positions of an array in the shape of `like`."""
    zeros = as_rows(jnp.zeros_like(like, dtype=bool), indices.shape[:-1])
    return from_rows(with_entries_set(zeros, indices, jnp.ones_like(indices, dtype=bool)), like)


def take_places(x: jax.Array, places: jax.Array) -> jax.Array:
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


def pack_bits(mask: jax.Array, parts: Parts) -> jax.Array:
    return jnp.packbits(as_rows(mask, parts), axis=-1)


def unpack_bits(bits: jax.Array, like: jax.Array) -> jax.Array:
    entries = like.size // math.prod(bits.shape[:-1])
    return from_rows(jnp.unpackbits(bits, axis=-1, count=entries).astype(bool), like)


def compact_start(masks: Any, is_static: bool, counts: Any) -> CompactActive:
    """The positions of the masks; `counts` holds their numbers of active weights."""
    packed = jax.tree.map(lambda mask: pack_bits(mask, parts_of(mask)), masks)
    return CompactActive(
        indices=jax.tree.map(
            lambda bits, mask, count: positions_of(bits, min(count, mask.size // math.prod(bits.shape[:-1]))),
            packed,
            masks,
            counts,
        ),
        point_indices=None,
        is_uncorrected=None,
        ever_active=None if is_static else packed,
    )


def positions_of(packed: jax.Array, capacity: int) -> jax.Array:
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
