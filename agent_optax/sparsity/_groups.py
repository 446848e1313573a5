"""Groups of entries along the input axis, of which a fixed number is active."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from agent_optax.sparsity.selection._tiles import join_axes, split_axis

INPUT_AXIS = -2  # of the kernels of Flax: (..., inputs, outputs)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Groups:
    """Exactly n active entries in every m along the input axis."""

    n: int
    m: int

    @functools.partial(jax.jit, inline=True)
    def best(self, scores: jax.Array, first: jax.Array) -> jax.Array:
        """The n entries of each group that come first: those of `first`, then by falling score, then by position."""
        like, scores, first = first, self._split(scores), self._split(first)

        def count(j: jax.Array, before: jax.Array) -> jax.Array:
            """Adds to `before` where entry j comes before an entry."""
            other = jax.lax.dynamic_slice_in_dim(scores, j, 1, INPUT_AXIS)
            other_first = jax.lax.dynamic_slice_in_dim(first, j, 1, INPUT_AXIS)
            position = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim + INPUT_AXIS)
            is_better = (other > scores) | ((other == scores) & (j < position))
            is_before = (other_first & ~first) | ((other_first == first) & is_better)
            return before + is_before.astype(jnp.int32)

        before = jax.lax.fori_loop(0, self.m, count, jnp.zeros_like(scores, dtype=jnp.int32))
        return join_axes(before < self.n, like)

    def filled(self, scores: jax.Array, kept: jax.Array) -> jax.Array:
        """The kept entries, at most n of a group, and those of largest score up to n."""
        return self.best(scores, first=kept)

    def are_exact(self, mask: jax.Array) -> jax.Array:
        """Whether every group has n active entries."""
        return jnp.all(jnp.sum(self._split(mask), axis=INPUT_AXIS) == self.n)

    def _split(self, x: jax.Array) -> jax.Array:
        return split_axis(x, INPUT_AXIS, self.m)
