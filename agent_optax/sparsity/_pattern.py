"""What a pattern is: which masks are allowed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from agent_optax._validation import is_concrete_number
from agent_optax.sparsity._layer import Layer
from agent_optax.sparsity.selection._top_k import random_scores, select


class Pattern:
    """Which masks of a layer are allowed: any. A subclass overrides what differs: `n_m`, `fan_in`, `blocks`, ...

    A layer has the shape ``[*spatial, inputs, outputs]``, whatever the axes of its leaf. What becomes active together
    is a unit: a weight, or a block of them. Layers of equal shape and equal pattern are updated together, so a pattern
    must be hashable: a frozen dataclass.
    """

    density: float | None = None  # if the pattern fixes it
    has_groups = False  # whether groups of units keep a fixed number of active ones
    has_blocks = False  # whether entries become active together
    keeps_counts = True  # whether the number of active entries stays when the topology keeps it
    needs_axes = True  # whether it depends on which axes of a leaf are inputs

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises ValueError if a layer of this shape cannot have the pattern."""
        del name, shape

    def unit_size(self, shape: tuple[int, ...]) -> int:
        """How many entries become active together."""
        del shape
        return 1

    def num_units(self, shape: tuple[int, ...]) -> int:
        """How many units a layer has."""
        return math.prod(shape)

    def step(self, shape: tuple[int, ...]) -> int:
        """The least number of units by which the number of active ones can change."""
        del shape
        return 1

    def most(self, shape: tuple[int, ...]) -> int:
        """The largest number of active units."""
        return self.num_units(shape)

    def count(self, shape: tuple[int, ...], density: float) -> int:
        """How many units are active."""
        return round(density * self.num_units(shape))

    def num_entries(self, shape: tuple[int, ...], number: int) -> int | None:
        """How many entries are in `number` active units; None where it depends on which they are."""
        return number * self.unit_size(shape)

    def random_mask(self, number: int, like: jax.Array, key: jax.Array) -> jax.Array:
        """A mask with this many active units."""
        return select(random_scores(key, like), number)

    def allows(self, mask: jax.Array) -> jax.Array:
        """Whether a mask has the pattern."""
        del mask
        return jnp.ones((), bool)

    def units(self, layer: Layer) -> Layer:
        """The layer as a topology is to see it."""
        return layer

    def entries(self, mask: jax.Array, like: jax.Array) -> jax.Array:
        """From the mask of `units` to that of the layer, shaped as `like`."""
        del like
        return mask


@dataclasses.dataclass(frozen=True)
class Unstructured(Pattern):
    """Each weight by itself."""

    needs_axes = False


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


def fixed_sparsity(sparsity: Any, pattern: PatternChoice) -> Any:
    """The sparsity that a pattern fixes, if it does; ValueError if another one was passed."""
    if not isinstance(pattern, Pattern) or pattern.density is None:
        return sparsity
    fixed = 1 - pattern.density
    if is_concrete_number(sparsity) and abs(sparsity - fixed) > 1e-9:
        raise ValueError(
            f"sparsity={sparsity} does not fit pattern={pattern}, whose sparsity is {fixed:g}: leave it out."
        )
    return fixed if sparsity is None else sparsity
