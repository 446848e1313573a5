"""The masks with which training starts, and the numbers of active weights at which it aims."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from agent_optax._tree import is_masked
from agent_optax.sparsity._distribution import Distribution
from agent_optax.sparsity._pattern import Pattern
from agent_optax.sparsity._topology import Target
from agent_optax.sparsity._where import densities


class Start(NamedTuple):
    """What `sparsify` starts from."""

    masks: Any  # like params, bool; MaskedNode where nothing is pruned
    counts: Any  # like masks, int: active weights
    targets: list[Target]  # of the pruned leaves, in their order


def random_start(
    params: optax.Params,
    chosen: Any,
    patterns: Sequence[Pattern],
    sparsity: Any,
    initial_sparsity: float | None,
    distribution: Distribution,
    key: jax.Array,
) -> Start:
    """Random masks of the patterns; an initial sparsity says where they start, never sparser than they end."""
    shapes = [jnp.shape(leaf) for leaf, c in zip(jax.tree.leaves(params), jax.tree.leaves(chosen), strict=True) if c]
    shared = [density for _, density in densities(params, chosen, sparsity, distribution)]
    targets, numbers = _targets(shapes, patterns, shared)
    if initial_sparsity is not None:
        initial = [density for _, density in densities(params, chosen, initial_sparsity, distribution)]
        numbers = [
            max(number, pattern.count(shape, density))
            for number, pattern, shape, density in zip(numbers, patterns, shapes, initial, strict=True)
        ]
    remaining = iter(zip(patterns, numbers, strict=True))
    index = iter(range(len(jax.tree.leaves(params))))
    counts = []

    def random_mask(c: Any, leaf: jax.Array) -> Any:
        if is_masked(leaf):  # hidden by optax.masked or optax.partition
            return leaf
        leaf_key = jax.random.fold_in(key, next(index))
        if not c:
            return optax.MaskedNode()
        pattern, number = next(remaining)
        counts.append(number)
        return pattern.random_mask(number, leaf, leaf_key)

    masks = jax.tree.map(random_mask, chosen, params, is_leaf=is_masked)
    return Start(masks, jax.tree.structure(masks).unflatten(counts), targets)


def given_start(
    params: optax.Params,
    masks: Any,
    patterns: Sequence[Pattern],
    names: Sequence[str],
    final_sparsity: Any,
    distribution: Distribution,
    must_count: bool,
) -> Start:
    """Masks that a user gave; they aim at their own numbers, or at a final sparsity."""
    for mask, pattern, name in zip(jax.tree.leaves(masks), patterns, names, strict=True):
        if _is_surely_false(pattern.allows(mask)):
            raise ValueError(f"masks= does not have the pattern {pattern} in {name}: mend the mask, or drop pattern=.")
    if final_sparsity is None:
        targets = [
            Target(mask.size // unit, math.nan, jnp.sum(mask, dtype=jnp.int32) // unit)
            for mask, unit in ((m, p.unit_size(m.shape)) for m, p in zip(jax.tree.leaves(masks), patterns, strict=True))
        ]
    else:
        chosen = jax.tree.map(lambda _, m: not is_masked(m), params, masks)
        shared = [density for _, density in densities(params, chosen, final_sparsity, distribution)]
        targets, _ = _targets([mask.shape for mask in jax.tree.leaves(masks)], patterns, shared)
    return Start(masks, jax.tree.map(_concrete_count, masks) if must_count else None, targets)


def _is_surely_false(truth: jax.Array) -> bool:
    try:
        return not truth
    except jax.errors.TracerBoolConversionError:
        return False


def _targets(
    shapes: Sequence[tuple[int, ...]], patterns: Sequence[Pattern], shared: Sequence[float]
) -> tuple[list[Target], list[int]]:
    """The targets, and the numbers of active weights; a pattern may fix the density."""
    targets, numbers = [], []
    for shape, pattern, density in zip(shapes, patterns, shared, strict=True):
        density = density if pattern.density is None else pattern.density
        unit, number = pattern.unit_size(shape), pattern.count(shape, density)
        targets.append(Target(math.prod(shape) // unit, density, number // unit))
        numbers.append(number)
    return targets, numbers


def _concrete_count(mask: jax.Array) -> int:
    try:
        return int(np.count_nonzero(np.asarray(mask)))
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
        raise ValueError(
            "storage='compact' fixes the number of active weights when it is built, so masks= must be known then: "
            "pass plain arrays, not values traced by jax.jit or jax.vmap."
        ) from error
