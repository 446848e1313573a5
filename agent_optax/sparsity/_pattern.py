"""What a pattern is: which masks are allowed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from agent_optax.sparsity._layer import Layer
from agent_optax.sparsity.selection._top_k import random_scores, select


class Pattern:
    """Which masks are allowed: any. A subclass overrides what differs: `n_m`, `blocks`, `output_channels`.

    Layers of equal shape and equal pattern are updated together, so a pattern must be hashable: a frozen dataclass.
    """

    density: float | None = None  # if the pattern fixes it
    has_groups = False  # whether groups of entries keep a fixed number of active ones
    has_blocks = False  # whether entries become active together

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises ValueError if a leaf of this shape cannot have the pattern."""
        del name, shape

    def unit_size(self, shape: tuple[int, ...]) -> int:
        """How many entries become active together."""
        del shape
        return 1

    def count(self, shape: tuple[int, ...], density: float) -> int:
        """How many entries are active."""
        unit = self.unit_size(shape)
        return round(density * (math.prod(shape) // unit)) * unit

    def random_mask(self, count: int, like: jax.Array, key: jax.Array) -> jax.Array:
        """A mask with this many active entries."""
        return select(random_scores(key, like), count)

    def allows(self, mask: jax.Array) -> jax.Array:
        """Whether a mask has the pattern."""
        del mask
        return jnp.ones((), bool)

    def units(self, layer: Layer) -> Layer:
        """The layer as a topology is to see it."""
        return layer

    def entries(self, mask: jax.Array, like: jax.Array) -> jax.Array:
        """From the mask of `units` to that of the leaf, shaped as `like`."""
        del like
        return mask


@dataclasses.dataclass(frozen=True)
class Unstructured(Pattern):
    """Each weight by itself."""


PatternChoice = Pattern | Callable[[str], Pattern | None] | None


def patterns_of(pattern: PatternChoice, names: list[str]) -> list[Pattern]:
    """The pattern of each leaf to prune, by its name."""
    if not callable(pattern):
        return [pattern or Unstructured()] * len(names)
    chosen = [pattern(name) or Unstructured() for name in names]
    for name, one in zip(names, chosen, strict=True):
        if not isinstance(one, Pattern):
            raise TypeError(
                f"pattern= must give a pattern such as agent_optax.n_m(2, 4), or None, for each leaf; for {name} it "
                f"gave {one!r}."
            )
    return chosen


def check_pattern(pattern: PatternChoice) -> None:
    """Raises TypeError unless it is a pattern, a callable on the path of a leaf, or None."""
    if pattern is not None and not isinstance(pattern, Pattern) and not callable(pattern):
        raise TypeError(
            "pattern must be a pattern such as agent_optax.n_m(2, 4) or agent_optax.blocks((4, 4)), or a callable that "
            f"gives one for the path of a leaf, got {pattern!r}."
        )
