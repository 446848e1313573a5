"""An update that holds active entries only, and adds itself to a parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from agent_optax._tree import updated
from agent_optax.sparsity.storages._shards import as_rows, from_rows, row_by_row

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


class EntryUpdates(NamedTuple):
    """The update of one leaf at its active entries."""

    indices: jax.Array  # int32 [nnz], sorted flat positions in the parameter; or [*parts, capacity], in each part
    values: jax.Array  # like indices: what is added there


class _DescribedByRemedy(type):
    """JAX and Optax name the type of an argument that they cannot compute with: let the name say what to do."""

    def __repr__(cls) -> str:
        return "agent_optax.SparseUpdate, which can only be added to its parameter, as optax.apply_updates does"


class SparseUpdate(metaclass=_DescribedByRemedy):
    """The update of one leaf with ``sparsify(..., storage="compact", updates="sparse")``.

    It adds itself to a parameter at the active entries, and the others are not touched: ``p + update``, as
    `optax.apply_updates` computes. Nothing else works, and it cannot leave the function that `jax.jit` compiles.

    Attributes:
        entries: where and what it adds.

    Example:
        >>> import agent_optax, jax.numpy as jnp, optax
        >>> tx = agent_optax.sparsify(
        ...     optax.sgd(1.0), agent_optax.static(), sparsity=0.75, storage="compact", updates="sparse"
        ... )
        >>> params = jnp.ones((4, 4))
        >>> opt_state = tx.init(params)
        >>> updates, _ = tx.update(params, opt_state, agent_optax.mask_params(params, opt_state))
        >>> float(optax.apply_updates(params, updates).sum())  # four weights less 1
        12.0
        >>> 0.5 * updates
        Traceback (most recent call last):
        ...
        TypeError: a sparse update can only be added to its parameter, as optax.apply_updates does...
    """

    __array_ufunc__ = None  # lets `numpy_array + update` reach __radd__
    __slots__ = ("entries",)

    def __init__(self, entries: EntryUpdates):
        """Holds the entries."""
        self.entries = entries

    def __radd__(self, param: Any) -> jax.Array:
        """The parameter with the values added at the active entries, rounded once."""
        indices, values = self.entries
        param = jnp.asarray(param)
        rows = as_rows(param, indices.shape[:-1])
        if values.dtype == rows.dtype:
            return from_rows(with_entries_added(rows, indices, values), param)
        sums = updated(entries_at(rows, indices), values)
        return from_rows(with_entries_set(rows, indices, sums), param)

    def __repr__(self) -> str:
        """Says what it is for."""
        return f"<{type(self)!r}: {REMEDY}>"

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"a sparse update can only be added to its parameter, as optax.apply_updates does: {REMEDY}.")

    def __getattr__(self, name: str) -> Any:
        """Refuses what arrays have; `hasattr` of other names is False."""
        if name.startswith("__") or not hasattr(jax.Array, name):
            raise AttributeError(name)
        return self._refuse()

    __add__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __pow__ = __rpow__ = _refuse
    __matmul__ = __rmatmul__ = __neg__ = __abs__ = __getitem__ = __iter__ = __len__ = __float__ = __bool__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __array__ = _refuse  # type: ignore[assignment]
    __hash__ = object.__hash__


REMEDY = "to compute with updates, pass updates='arrays' to agent_optax.sparsify"
