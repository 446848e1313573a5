"""Groups of m consecutive entries along an axis, of which n are active, or at most n."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from agent_optax.sparsity._groups import Groups
from agent_optax.sparsity.selection._tiles import join_axes, merge_axes, split_axis
from agent_optax.sparsity.selection._top_k import num_true, select

INPUT_AXIS, OUTPUT_AXIS = -2, -1  # of a layer [*spatial, inputs, outputs]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class NMGroups(Groups):
    """N active entries in every m along an axis of a layer; groups may straddle the rows of a filter, if they must."""

    n: int
    m: int
    axis: int = INPUT_AXIS
    at_most: bool = False

    def best(
        self,
        scores: jax.Array,
        number: int | jax.Array,
        first: jax.Array | None = None,
        first_scores: jax.Array | None = None,
    ) -> jax.Array:
        """The n entries of each group that come first; with `at_most`, the best `number` of those."""
        full = self._best_of_each(scores, jnp.zeros_like(scores, dtype=bool) if first is None else first)
        if not self.at_most:
            return full
        number = jnp.asarray(number, jnp.int32)
        if first is None:
            return select(scores, number, candidates=full)
        candidates = first & full
        ranked = scores if first_scores is None else first_scores
        kept = select(ranked, jnp.minimum(number, num_true(candidates)), candidates)
        return kept | select(scores, number - num_true(kept), full & ~first)

    def hold(self, mask: jax.Array) -> jax.Array:
        """Whether every group has n active entries, or at most n."""
        numbers = jnp.sum(self._split(mask), axis=self.axis)
        return jnp.all(numbers <= self.n) if self.at_most else jnp.all(numbers == self.n)

    @functools.partial(jax.jit, inline=True)
    def _best_of_each(self, scores: jax.Array, first: jax.Array) -> jax.Array:
        """N of each group: those of `first`, then by falling score, then by position."""
        like, scores, first = first, self._split(scores), self._split(first)

        def count(j: jax.Array, before: jax.Array) -> jax.Array:
            """Adds to `before` where entry j comes before an entry."""
            other = jax.lax.dynamic_slice_in_dim(scores, j, 1, self.axis)
            other_first = jax.lax.dynamic_slice_in_dim(first, j, 1, self.axis)
            position = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim + self.axis)
            is_better = (other > scores) | ((other == scores) & (j < position))
            is_before = (other_first & ~first) | ((other_first == first) & is_better)
            return before + is_before.astype(jnp.int32)

        before = jax.lax.fori_loop(0, self.m, count, jnp.zeros_like(scores, dtype=jnp.int32))
        return join_axes(before < self.n, like)

    def _split(self, x: jax.Array) -> jax.Array:
        if x.shape[self.axis] % self.m:
            x = merge_axes(x, 0, x.ndim - 1)
        return split_axis(x, self.axis, self.m)
