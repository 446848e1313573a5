"""The same number of active units in each output: constant fan-in."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from agent_optax.sparsity._groups import Groups
from agent_optax.sparsity.selection._tiles import laid_out_as, merge_axes, split_merged, whole_axis
from agent_optax.sparsity.selection._top_k import num_true, select


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Columns(Groups):
    """As many active units in each column as in any other: a column is all that feeds one output, or group of outputs.

    With `ablation`, a column with few salient units loses all of them, and the others share what it had.
    """

    ablation: float | None = None

    @functools.partial(jax.jit, inline=True)
    def best(
        self,
        scores: jax.Array,
        number: int | jax.Array,
        first: jax.Array | None = None,
        first_scores: jax.Array | None = None,
    ) -> jax.Array:
        """K units of each column: those of `first`, then by falling score."""
        number, matrix = jnp.asarray(number, jnp.int32), _matrix(scores)
        first = None if first is None else _matrix(first)
        first_scores = matrix if first_scores is None else _matrix(first_scores)
        size, num_columns = matrix.shape
        if self.ablation is None:
            quota = jnp.full(num_columns, number // num_columns)
        else:
            num_salient = _in_columns(_best_of_all(matrix, number, first, first_scores))
            fewest = jnp.clip((number + size - 1) // size, 1, num_columns)  # columns that hold so many units
            least = jnp.maximum(
                jnp.floor(self.ablation * (number // num_columns).astype(jnp.float32)).astype(jnp.int32), 1
            )
            alive = num_salient >= jnp.minimum(least, jnp.sort(num_salient, descending=True)[fewest - 1])
            num_alive = num_true(alive)
            quota = jnp.where(alive, jnp.clip((number + num_alive // 2) // num_alive, 1, size), 0)
        select_columns = jax.vmap(select, in_axes=(1, 0, 1), out_axes=1)
        if first is None:
            mask = select_columns(matrix, quota, jnp.ones_like(matrix, dtype=bool))
        else:
            kept = select_columns(first_scores, jnp.minimum(quota, _in_columns(first)), first)
            mask = kept | select_columns(matrix, quota - _in_columns(kept), ~first)
        return laid_out_as(split_merged(mask, 0, scores.shape[:-1]), scores)

    def hold(self, mask: jax.Array) -> jax.Array:
        """Whether all columns have the same number, or with ablation none."""
        numbers = _in_columns(_matrix(mask))
        is_same = numbers == jnp.max(numbers, initial=0)
        return jnp.all(is_same if self.ablation is None else is_same | (numbers == 0))


def _matrix(layer: jax.Array) -> jax.Array:
    """[inputs, outputs], whole along the outputs: with explicit sharding JAX cannot map loops over a split axis."""
    return whole_axis(merge_axes(layer, 0, layer.ndim - 1), 1)


def _in_columns(matrix: jax.Array) -> jax.Array:
    """int32 [outputs]: how many are True in each column."""
    return jnp.sum(matrix, axis=0, dtype=jnp.int32)


def _best_of_all(scores: jax.Array, number: jax.Array, first: jax.Array | None, first_scores: jax.Array) -> jax.Array:
    """The best wherever they lie: those of `first`, then by falling score."""
    if first is None:
        return select(scores, number)
    num_first = jnp.minimum(num_true(first), number)
    return select(first_scores, num_first, first) | select(scores, number - num_first, ~first)
