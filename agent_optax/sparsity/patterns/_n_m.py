"""N:M sparsity: n active weights in every m consecutive ones along an axis."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax

from agent_optax._validation import check_positive_int
from agent_optax.sparsity._layer import Layer
from agent_optax.sparsity._pattern import Pattern
from agent_optax.sparsity.patterns._n_m_groups import INPUT_AXIS, OUTPUT_AXIS, NMGroups
from agent_optax.sparsity.selection._top_k import random_scores, select


def n_m(n: int, m: int, *, axis: Literal["inputs", "outputs"] = "inputs", at_most: bool = False) -> NM:
    r"""N:M sparsity, for ``sparsify(..., pattern=)``: of every m weights in a row, exactly n are active.

    The rows run along the inputs of a layer (see `Axes`), over which a product sums: groups of m inputs that feed one
    output, as the sparse matrix units of GPUs want it (2:4). The pattern fixes the sparsity, 1 - n/m, so `sparsify`
    needs none. It is exact from the start and after every topology update: a weight is replaced by one of the same
    group. `gradual_pruning` reaches it at its last update; the best n of a group are safe until then.

    Args:
        n: active weights of a group, 1 <= n <= m.
        m: weights of a group; the number of inputs (or outputs) must be a multiple of it.
        axis: along what groups lie. ``"inputs"`` (default), or ``"outputs"``: for the product of the backward pass,
            which sums over outputs.
        at_most: whether a group may have fewer active weights than n, for networks that are sparser than n of m:
            `sparsify` needs a `sparsity` of at least 1 - n/m for each layer then. Default False.

    Returns:
        A pattern for `agent_optax.sparsify`.

    Raises:
        ValueError: if an argument is out of range; from ``init``, if m does not divide the inputs of a leaf, or with
            `at_most` a layer is to be denser than n/m.

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
    if axis not in ("inputs", "outputs"):
        raise ValueError(
            f"axis must be 'inputs' or 'outputs', got {axis!r}: agent_optax.Axes says which axes those are."
        )
    return NM(n, m, axis, at_most)


@dataclasses.dataclass(frozen=True)
class NM(Pattern):
    """See `n_m`."""

    n: int
    m: int
    axis: str = "inputs"
    at_most: bool = False
    has_groups = True

    @property
    def density(self) -> float | None:
        """The share of active weights, unless it may be less."""
        return None if self.at_most else self.n / self.m

    @property
    def groups(self) -> NMGroups:
        """What a topology keeps exact."""
        return NMGroups(self.n, self.m, INPUT_AXIS if self.axis == "inputs" else OUTPUT_AXIS, self.at_most)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Inputs or outputs are a whole number of groups."""
        number = 0 if len(shape) < 2 else shape[-1] if self.axis == "outputs" else math.prod(shape[:-1])
        if not number or number % self.m:
            raise ValueError(
                f"pattern=n_m({self.n}, {self.m}) needs a number of {self.axis} that is a multiple of {self.m}, but "
                f"{name} has layers of the shape {tuple(shape)}, outputs last: leave it out with where=, or give "
                "patterns leaf by leaf with a callable on the path."
            )

    def most(self, shape: tuple[int, ...]) -> int:
        """N of m, where there can be fewer; all of them while pruning is under way."""
        return math.prod(shape) * self.n // self.m if self.at_most else math.prod(shape)

    def count(self, shape: tuple[int, ...], density: float) -> int:
        """N of m, or more while pruning is under way."""
        number = round(density * math.prod(shape))
        return number if self.at_most else max(number, math.prod(shape) * self.n // self.m)

    def random_mask(self, number: int, like: jax.Array, key: jax.Array) -> jax.Array:
        """N of m at random, and any others if the number is larger."""
        key, other_key = jax.random.split(key)
        scores = random_scores(key, like)
        best = self.groups.best(scores, number)
        missing = number - like.size * self.n // self.m
        return best | select(random_scores(other_key, like), missing, candidates=~best) if missing > 0 else best

    def allows(self, mask: jax.Array) -> jax.Array:
        """Whether every group has n active entries, or at most n."""
        return self.groups.hold(mask)

    def units(self, layer: Layer) -> Layer:
        """The layer with its groups."""
        return layer._replace(groups=self.groups)
