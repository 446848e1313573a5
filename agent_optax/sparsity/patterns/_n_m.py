"""N:M sparsity: n active weights in every m consecutive ones along the input axis."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from agent_optax._validation import check_positive_int
from agent_optax.sparsity._groups import INPUT_AXIS, Groups
from agent_optax.sparsity._layer import Layer
from agent_optax.sparsity._pattern import Pattern
from agent_optax.sparsity.selection._top_k import random_scores, select


def n_m(n: int, m: int) -> NM:
    r"""N:M sparsity, for ``sparsify(..., pattern=)``: of every m weights in a row, exactly n are active.

    The rows run along the input axis of a kernel, the last but one in Flax's layout: groups of m inputs that feed one
    output, as the sparse matrix units of GPUs want it (2:4). The pattern fixes the sparsity, 1 - n/m, so `sparsify`
    needs none. It is exact from the start and after every topology update: a weight is replaced by one of the same
    group. `gradual_pruning` reaches it at its last update; the best n of a group are safe until then.

    Args:
        n: active weights of a group, 1 <= n <= m.
        m: weights of a group; the input axis must be a multiple of it.

    Returns:
        A pattern for `agent_optax.sparsify`.

    Raises:
        ValueError: if an argument is out of range; from ``init``, if m does not divide the input axis of a leaf.

    Example:
        >>> import agent_optax, jax.numpy as jnp, optax
        >>> tx = agent_optax.sparsify(optax.sgd(0.1), agent_optax.rigl(), pattern=agent_optax.n_m(2, 4))
        >>> params = jnp.ones((8, 3))
        >>> agent_optax.mask_params(params, tx.init(params)).reshape(2, 4, 3).sum(1)
        Array([[2., 2., 2.],
               [2., 2., 2.]], dtype=float32)

    References:
        Mishra et al., Accelerating Sparse Deep Neural Networks, 2021; Zhou et al., Learning N:M Fine-grained
        Structured Sparse Neural Networks from Scratch, ICLR 2021.
    """
    check_positive_int("n", n, "it counts the active weights of a group")
    check_positive_int("m", m, "it counts the weights of a group")
    if n > m:
        raise ValueError(f"n must not exceed m, got n={n}, m={m}: agent_optax.n_m(2, 4) keeps 2 of every 4 weights.")
    return NM(n, m)


@dataclasses.dataclass(frozen=True)
class NM(Pattern):
    """See `n_m`."""

    n: int
    m: int
    has_groups = True

    @property
    def density(self) -> float:
        """The share of active weights."""
        return self.n / self.m

    @property
    def groups(self) -> Groups:
        """What a topology keeps exact."""
        return Groups(self.n, self.m)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """The input axis is a whole number of groups."""
        if len(shape) < 2 or shape[INPUT_AXIS] % self.m:
            raise ValueError(
                f"pattern=n_m({self.n}, {self.m}) needs an input axis (the last but one) that is a multiple of "
                f"{self.m}, but {name} has the shape {tuple(shape)}: leave it out with where=, or give patterns leaf "
                "by leaf with a callable on the path."
            )

    def count(self, shape: tuple[int, ...], density: float) -> int:
        """N of m, or more while pruning is under way."""
        return max(round(density * math.prod(shape)), math.prod(shape) * self.n // self.m)

    def random_mask(self, count: int, like: jax.Array, key: jax.Array) -> jax.Array:
        """N of m at random, and any others if the count is larger."""
        key, other_key = jax.random.split(key)
        scores = random_scores(key, like)
        exact = self.groups.best(scores, first=jnp.zeros_like(scores, dtype=bool))
        missing = count - like.size * self.n // self.m
        return exact | select(random_scores(other_key, like), missing, candidates=~exact) if missing else exact

    def allows(self, mask: jax.Array) -> jax.Array:
        """Whether every group has n active entries."""
        return self.groups.are_exact(mask)

    def units(self, layer: Layer) -> Layer:
        """The layer with its groups."""
        return layer._replace(groups=self.groups)
