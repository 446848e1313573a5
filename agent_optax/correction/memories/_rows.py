"""A gradient for each batch of a pass: the rows, and the row that belongs to the current batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer


def empty_rows(params: optax.Params, num_batches: int) -> optax.Updates:
    """Zeros like `params` with a leading axis of batches, sharded as the parameters are."""
    return jax.tree.map(lambda p: jnp.broadcast_to(jnp.zeros_like(p), (num_batches, *p.shape)), params)


def take_row(rows: optax.Updates, index: jax.Array) -> optax.Updates:
    """The row of batch `index`, in every leaf."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, axis=0, keepdims=False), rows)


def put_row(rows: optax.Updates, row: optax.Updates, index: jax.Array) -> optax.Updates:
    """`rows` with the row of batch `index` replaced."""
    return jax.tree.map(
        lambda leaf, new: jax.lax.dynamic_update_index_in_dim(leaf, new.astype(leaf.dtype), index, axis=0), rows, row
    )


def look_up(values: jax.Array, index: jax.Array) -> jax.Array:
    """`values[index]` of a vector, as a sum: an index XLA would fuse into the loops over entries, and repeat there."""
    return jnp.sum(jnp.where(jnp.arange(values.shape[0]) == index, values, 0), dtype=values.dtype)


def current_row(extra_args: Mapping[str, Any], num_batches: int, memory: str) -> tuple[jax.Array, jax.Array]:
    """The row of the current batch, int32 [], and whether there is such a row, bool [].

    An index that is out of range raises ValueError when its value is known; a traced one is answered with False.
    """
    index = extra_args.get("batch_index")
    if index is None:
        raise ValueError(
            f"correct_gradients(memory={memory}) needs the extra argument batch_index= of update, which is missing: "
            f"the position of the batch among the {num_batches} batches of an epoch. Call "
            "tx.update(grads, opt_state, params, batch_index=i, **extras)."
        )
    index = jnp.asarray(index)
    if index.ndim or not jnp.issubdtype(index.dtype, jnp.integer):
        raise ValueError(
            f"batch_index must be a whole number, got an array of shape {index.shape} and dtype {index.dtype}: it is "
            f"the position of the current batch among {num_batches} batches."
        )
    if not isinstance(index, Tracer) and not 0 <= int(index) < num_batches:
        raise ValueError(
            f"batch_index must lie in 0 ... {num_batches - 1}, got {int(index)}: correct_gradients(memory={memory}) "
            f"has a row for each of {num_batches} batches. Make the memory larger, or count batches from 0 each epoch."
        )
    is_row = (index >= 0) & (index < num_batches)
    return jnp.where(is_row, index, 0).astype(jnp.int32), is_row
