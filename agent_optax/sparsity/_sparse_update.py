"""An update that holds active entries only, and adds itself to a parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# jax.lax and not ``x.at[indices]``: that first wraps negative indices, one more pass over all of them.


def entries_at(flat: jax.Array, indices: jax.Array) -> jax.Array:
    """``flat[indices]`` for sorted, distinct positions inside."""
    return jax.lax.gather(
        flat,
        indices[:, None],
        jax.lax.GatherDimensionNumbers(offset_dims=(), collapsed_slice_dims=(0,), start_index_map=(0,)),
        slice_sizes=(1,),
        unique_indices=True,
        indices_are_sorted=True,
        mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )


def with_entries_added(flat: jax.Array, indices: jax.Array, values: jax.Array) -> jax.Array:
    """`flat` plus `values` at sorted, distinct positions inside."""
    return _scattered(jax.lax.scatter_add, flat, indices, values)


def with_entries_set(flat: jax.Array, indices: jax.Array, values: jax.Array) -> jax.Array:
    """`flat` with `values` in place of its own at sorted, distinct positions inside."""
    return _scattered(jax.lax.scatter, flat, indices, values)


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
        indices: int32 [nnz], sorted flat positions in the parameter.
        values: [nnz], what is added there.
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
        return with_entries_added(param.reshape(-1), self.indices, self.values).reshape(param.shape)

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
