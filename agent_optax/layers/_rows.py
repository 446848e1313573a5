"""Sums of a few rows of a matrix each, and the products that are their derivatives."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

NUM_TERMS = 8  # terms added in one pass over the sums: each pass reads and writes all of them (measured: 1 to 16)
MOST_COLUMNS = 512  # of a matrix that rows are taken from: beyond, its sums leave the cache between passes
NUM_LANES = 8  # partial sums of an inner product, next to each other, so that vector instructions add them


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["sources", "positions", "segments"],
    meta_fields=["num_rows"],
)
@dataclasses.dataclass(frozen=True)
class Rows:
    r"""Entries of a sparse matrix, sorted by row and cut into pieces of K entries each.

    A matrix with N entries and n rows has at most :math:`\lfloor N / K \rfloor + n` pieces, however the entries are
    spread over the rows: the shapes depend on N and n alone. Pieces that are not full are filled with entries of
    position N, where every array of weights is extended by a zero, and with a column that the row has, so that what is
    not finite reaches no row but its own. Pieces that are not used belong to row n, which does not exist.
    """

    sources: jax.Array  # int32 [K, pieces]: the column of each entry
    positions: jax.Array  # int32 [K, pieces]: where its weight is in the array of weights, N if there is none
    segments: jax.Array  # int32 [pieces], sorted: the row that a piece belongs to, n if none
    num_rows: int


def split_rows(row: jax.Array, column: jax.Array, num_rows: int) -> tuple[Rows, jax.Array]:
    """Cuts the entries (row, column), int32 [N] each and in any order, into pieces.

    Also returns, int32 [N], where each entry is in the flattened [K, pieces].
    """
    return _split_rows(row, column, num_rows, _piece_size(row.size, num_rows))


def _piece_size(num_entries: int, num_rows: int) -> int:
    """About half the mean number of entries of a row: fewer make more pieces, more leave more of them empty."""
    half = num_entries / num_rows / 2
    return min(16, max(4, 2 ** round(math.log2(max(half, 1)))))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _split_rows(row: jax.Array, column: jax.Array, num_rows: int, size: int) -> tuple[Rows, jax.Array]:
    n = row.size
    num_pieces = n // size + num_rows
    order = jnp.argsort(row, stable=True).astype(jnp.int32)
    row = row[order]
    count = jnp.zeros(num_rows, jnp.int32).at[row].add(1)
    num_before = jnp.cumsum(count) - count
    pieces = -(-count // size)
    end = jnp.cumsum(pieces)
    within = jnp.arange(n, dtype=jnp.int32) - num_before[row]
    piece = (end - pieces)[row] + within // size
    slot = (within % size) * num_pieces + piece
    column = column[order].astype(jnp.int32)
    first = jnp.zeros(num_pieces, jnp.int32).at[piece].max(jnp.where(within % size == 0, column, 0))
    sources = jnp.tile(first, size).at[slot].set(column)
    positions = jnp.full(size * num_pieces, n, jnp.int32).at[slot].set(order)
    segments = jnp.searchsorted(end, jnp.arange(num_pieces, dtype=jnp.int32), side="right").astype(jnp.int32)
    rows = Rows(
        sources=sources.reshape(size, num_pieces),
        positions=positions.reshape(size, num_pieces),
        segments=segments,
        num_rows=num_rows,
    )
    return rows, jnp.zeros(n, jnp.int32).at[order].set(slot.astype(jnp.int32))


def product(rows: Rows, weights: jax.Array, x: jax.Array) -> jax.Array:
    """[num_rows, columns]: the sparse matrix with weights [N] times x [sources, columns]."""
    sums = sums_of_rows(jnp.append(weights, 0)[rows.positions], rows.sources, x)
    return jax.ops.segment_sum(sums, rows.segments, rows.num_rows, indices_are_sorted=True)


def rows_of(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[index], where every index is known to be in range."""
    return x.at[index].get(mode="promise_in_bounds")


def sums_of_rows(weights: jax.Array, sources: jax.Array, x: jax.Array) -> jax.Array:
    r""":math:`s_{rb} = \sum_j w_{jr}\, x_{c_{jr} b}`, for w and c [K, rows] and x [sources, columns]."""

    def add(sums: jax.Array, terms: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        for w, c in zip(*terms, strict=True):
            sums = sums + w[:, None] * rows_of(x, c)
        return sums, None

    sums = jnp.zeros((sources.shape[1], x.shape[1]), x.dtype)
    whole = len(sources) // NUM_TERMS * NUM_TERMS
    passes = tuple(array[:whole].reshape(-1, NUM_TERMS, array.shape[1]) for array in (weights, sources))
    sums, _ = jax.lax.scan(add, sums, (passes[0], passes[1]))
    return add(sums, (weights[whole:], sources[whole:]))[0]


def products_of_rows(sources: jax.Array, x: jax.Array, d: jax.Array) -> jax.Array:
    r""":math:`p_{jr} = \sum_b x_{c_{jr} b}\, d_{rb}`, for c [K, rows], x [sources, columns] and d [rows, columns].

    Each inner product is `NUM_LANES` sums over every eighth column, added up by a matrix product, which XLA does not
    merge with them into one sum in order, four times as slow.
    """
    padding = ((0, 0), (0, -x.shape[1] % NUM_LANES))
    x, d = (jnp.pad(array, padding).reshape(len(array), -1, NUM_LANES) for array in (x, d))

    def multiply(_: None, sources: jax.Array) -> tuple[None, jax.Array]:
        lanes = jnp.zeros((*sources.shape, NUM_LANES), x.dtype)
        for i in range(x.shape[1]):
            lanes = lanes + rows_of(x[:, i], sources) * d[:, i]
        return None, jnp.einsum("jrl,l->jr", lanes, jnp.ones(NUM_LANES, x.dtype), precision="highest")

    whole = len(sources) // NUM_TERMS * NUM_TERMS
    _, products = jax.lax.scan(multiply, None, sources[:whole].reshape(-1, NUM_TERMS, sources.shape[1]))
    return jnp.concatenate([products.reshape(whole, sources.shape[1]), multiply(None, sources[whole:])[1]])
