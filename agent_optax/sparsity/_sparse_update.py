"""An update that holds active entries only, and adds itself to a parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from agent_optax.sparsity._shards import as_rows, from_rows, row_by_row

# A single row by jax.lax and not by ``row.at[indices]``, which first wraps negative indices: one more pass over them.


def entries_at(rows: jax.Array, indices: jax.Array) -> jax.Array:
    """``rows[indices]``, row by row, for sorted, distinct positions inside; zero for padding."""
    if indices.ndim > 1:
        take = lambda row, i: row.at[i].get(mode="fill", fill_value=0, indices_are_sorted=True, unique_indices=True)  # noqa: E731
        return row_by_row(take, indices.shape[:-1])(rows, indices)
    return jax.lax.gather(
        rows,
        indices[:, None],
        jax.lax.GatherDimensionNumbers(offset_dims=(), collapsed_slice_dims=(0,), start_index_map=(0,)),
        slice_sizes=(1,),
        unique_indices=True,
        indices_are_sorted=True,
        mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )


def with_entries_added(rows: jax.Array, indices: jax.Array, values: jax.Array) -> jax.Array:
    """`rows` plus `values` at sorted, distinct positions inside; nothing for padding."""
    if indices.ndim > 1:
        add = lambda row, i, v: row.at[i].add(v, mode="drop", indices_are_sorted=True, unique_indices=True)  # noqa: E731
        return row_by_row(add, indices.shape[:-1])(rows, indices, values)
    return _scattered(jax.lax.scatter_add, rows, indices, values)


def with_entries_set(rows: jax.Array, indices: jax.Array, values: jax.Array) -> jax.Array:
    """`rows` with `values` in place of its own at sorted, distinct positions inside; nothing for padding."""
    if indices.ndim > 1:
        put = lambda row, i, v: row.at[i].set(v, mode="drop", indices_are_sorted=True, unique_indices=True)  # noqa: E731
        return row_by_row(put, indices.shape[:-1])(rows, indices, values)
    return _scattered(jax.lax.scatter, rows, indices, values)


def _scattered(scatter: Callable[..., jax.Array], flat: jax.Array, indices: jax.Array, values: jax.Array) -> jax.Array:
    return scatter(
        flat,
        indices[:, None],
        values,
        jax.lax.ScatterDimensionNumbers(
            update_window_dims=(), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0,)
        ),
        indices_are_sorted=True,
        unique_indices=True,
        mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )


@jax.tree_util.register_pytree_with_keys_class
class SparseUpdate:
    """The update of one leaf at its active entries: what `optax.apply_updates` adds with ``p + update``.

    Attributes:
        indices: int32 [nnz], sorted flat positions in the parameter; for one that is split over devices by its type,
            [*parts, capacity], positions in each part, and padding after the last.
        values: like indices, what is added there.
    """

    __array_ufunc__ = None  # lets `numpy_array + update` reach __radd__

    def __init__(self, indices: Any, values: Any):
        """Holds `values` for the flat positions `indices`."""
        self.indices = indices
        self.values = values

    def __radd__(self, param: Any) -> jax.Array:
        """The parameter with the values added at the active entries; the others are not touched."""
        if not jnp.issubdtype(self.indices.dtype, jnp.integer):
            raise TypeError(
                "a sparse update was computed with as if it were an array, which scaled its indices: pass "
                "dense_updates=True to sparsify when another transformation or wrapper works on its updates."
            )
        param = jnp.asarray(param)
        rows = as_rows(param, self.indices.shape[:-1])
        return from_rows(with_entries_added(rows, self.indices, self.values), param)

    def __repr__(self) -> str:
        """Shows the fields."""
        return f"SparseUpdate(indices={self.indices!r}, values={self.values!r})"

    def tree_flatten_with_keys(self) -> Any:
        """Children: indices and values."""
        key = jax.tree_util.GetAttrKey
        return ((key("indices"), self.indices), (key("values"), self.values)), None

    @classmethod
    def tree_unflatten(cls, aux: None, children: Any) -> SparseUpdate:
        """The inverse."""
        del aux
        return cls(*children)
