"""Masks of the units of largest score, of all layers together or of each, at once or in rounds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from agent_optax._validation import check_fraction
from agent_optax.sparsity._default_axes import AxesChoice, check_axes
from agent_optax.sparsity._distribution import Distribution
from agent_optax.sparsity._layer import Layer
from agent_optax.sparsity._pattern import Pattern, PatternChoice, check_pattern, fixed_sparsity
from agent_optax.sparsity._pruned_leaf import PrunedLeaf, pruned_leaves
from agent_optax.sparsity._rounding import tolerant_floor
from agent_optax.sparsity._start import active_units, shared_densities
from agent_optax.sparsity._where import check_sizes, prunable
from agent_optax.sparsity.selection._top_k import select, select_from_all, select_jointly

# (masked params, pruned leaves, the layers of those with their patterns) -> the scores of the units of each layer
UnitScores = Callable[[optax.Params, Sequence[PrunedLeaf], Sequence[tuple[Pattern, Layer]]], list[jax.Array]]


@dataclasses.dataclass(frozen=True)
class Budget:
    """How many units stay: `total` of all layers together, or numbers[i] of the i-th."""

    total: int | None
    numbers: list[int]
    sizes: list[int]  # units of each layer
    allow_empty: bool

    def in_rounds(self, rounds: int) -> list[list[int]]:
        r"""The numbers of each round but the last: :math:`d^{k / n}` of the units, where d is the final density."""

        def number(size: int, last: int, k: int) -> int:
            return max(last, tolerant_floor(size * (last / size) ** (k / rounds))) if size else 0

        ks = range(1, rounds)
        if self.total is not None:
            return [[number(sum(self.sizes), self.total, k)] for k in ks]
        return [[number(s, n, k) for s, n in zip(self.sizes, self.numbers, strict=True)] for k in ks]


def largest_masks(
    who: str,
    params: optax.Params,
    scores_of: UnitScores,
    sparsity: float | None,
    rounds: int,
    where: Any,
    scope: str,
    distribution: Distribution,
    pattern: PatternChoice,
    axes: AxesChoice,
    allow_empty: bool,
) -> Any:
    """A tree like `params` of bool arrays, None where nothing is pruned; for the arguments see `score_masks`."""
    check_pattern(pattern)
    check_axes(axes)
    sparsity = fixed_sparsity(sparsity, pattern)
    if sparsity is not None:
        check_fraction("sparsity", sparsity, "it is the share of inactive weights, such as 0.9", below_one=True)
    if scope not in ("global", "layer"):
        raise ValueError(f"scope must be 'global' or 'layer', got {scope!r}.")
    leaves, treedef = jax.tree.flatten(params)
    pruned = pruned_leaves(params, jax.tree.leaves(prunable(params, where)), pattern, axes)
    for leaf in pruned:
        leaves[leaf.index] = jnp.asarray(leaves[leaf.index])
    budget = _budget(who, params, pruned, sparsity, scope, distribution, allow_empty)
    rule = _Rounds(pruned, budget, rounds, lambda leaves, layers: scores_of(treedef.unflatten(leaves), pruned, layers))
    found: list[Any] = [None] * len(leaves)
    for leaf, mask in zip(pruned, rule.masks(leaves), strict=True):
        found[leaf.index] = mask
    return treedef.unflatten(found)


@dataclasses.dataclass(frozen=True, eq=False)
class _Rounds:
    """Prunes in rounds; `leaves` are those of params, and layers those of the pruned ones, with their patterns."""

    pruned: Sequence[PrunedLeaf]
    budget: Budget
    rounds: int
    scores_of: Callable[[Sequence[Any], Sequence[tuple[Pattern, Layer]]], list[jax.Array]]

    def masks(self, leaves: Sequence[Any]) -> list[jax.Array]:
        """The masks of the pruned leaves."""
        if self.rounds == 1:
            return self._all_rounds(leaves)
        self.scores_of(leaves, self._layers(leaves))  # for its errors: inside the loop no number is known
        return jax.jit(self._all_rounds)(leaves)

    def _all_rounds(self, leaves: Sequence[Any]) -> list[jax.Array]:
        budget, masks = self.budget, [pattern.units(layer).mask for pattern, layer in self._layers(leaves)]
        if self.rounds > 1:
            numbers = jnp.asarray(budget.in_rounds(self.rounds), jnp.int32)

            def prune(k: jax.Array, masks: list[jax.Array]) -> list[jax.Array]:
                return self._round(leaves, masks, numbers[k], is_last=False)

            masks = jax.lax.fori_loop(0, self.rounds - 1, prune, masks)
        last = budget.numbers if budget.total is None else [budget.total]
        return self._whole(leaves, self._round(leaves, masks, last, is_last=True))

    def _round(self, leaves: Sequence[Any], masks: list[jax.Array], numbers: Any, is_last: bool) -> list[jax.Array]:
        """The units of largest score of those that the masks have left."""
        masked, layer_masks = list(leaves), []
        for leaf, mask in zip(self.pruned, self._whole(leaves, masks), strict=True):
            masked[leaf.index] = jnp.where(mask, leaves[leaf.index], jnp.zeros_like(leaves[leaf.index]))
            layer_masks += leaf.axes.unstacked(mask)
        layers = [
            (pattern, layer._replace(mask=mask))
            for (pattern, layer), mask in zip(self._layers(masked), layer_masks, strict=True)
        ]
        units = [pattern.units(layer) for pattern, layer in layers]
        return _largest(self.budget, units, self.scores_of(masked, layers), numbers, is_last)

    def _layers(self, leaves: Sequence[Any]) -> list[tuple[Pattern, Layer]]:
        """All active."""
        return [  # ~zeros: laid out over devices as the weights are
            (leaf.pattern, Layer(layer, ~jnp.zeros_like(layer, dtype=bool), layer, None))
            for leaf in self.pruned
            for layer in leaf.axes.unstacked(leaves[leaf.index])
        ]

    def _whole(self, leaves: Sequence[Any], masks: Sequence[jax.Array]) -> list[jax.Array]:
        """The masks of the pruned leaves, from those of the units of each layer."""
        layers = self._layers(leaves)
        entries = iter(pattern.entries(mask, layer.mask) for (pattern, layer), mask in zip(layers, masks, strict=True))
        return [
            leaf.axes.restacked([next(entries) for _ in range(leaf.num_layers)], leaves[leaf.index])
            for leaf in self.pruned
        ]


def _largest(
    budget: Budget, units: Sequence[Layer], scores: Sequence[jax.Array], numbers: Any, is_last: bool
) -> list[jax.Array]:
    masks = [unit.mask for unit in units]
    if budget.total is not None:
        take = select_jointly if budget.allow_empty else select_from_all
        return take(scores, numbers[0], masks)
    chosen = []
    for i, (unit, score, mask) in enumerate(zip(units, scores, masks, strict=True)):
        candidates = jnp.where(mask, score, -jnp.inf)
        if unit.groups is None:
            chosen.append(select(score, numbers[i], mask))
        elif is_last:
            chosen.append(unit.groups.best(candidates, numbers[i]))
        else:  # the best of each group are safe until the last round
            best = unit.groups.best(candidates, budget.numbers[i])
            chosen.append(select(jnp.where(best, jnp.inf, score), numbers[i], mask))
    return chosen


def _budget(
    who: str,
    params: optax.Params,
    pruned: Sequence[PrunedLeaf],
    sparsity: float | None,
    scope: str,
    distribution: Distribution,
    allow_empty: bool,
) -> Budget:
    units = [leaf.pattern.num_units(leaf.layer_shape) for leaf in pruned for _ in range(leaf.num_layers)]
    is_joint = scope == "global" and not any(leaf.pattern.has_groups for leaf in pruned)
    check_sizes({leaf.name: math.prod(leaf.shape) for leaf in pruned}, counts_jointly=is_joint)
    if not is_joint:
        for leaf in pruned:
            if scope == "global" and leaf.pattern.density is None:
                raise ValueError(
                    f"scope='global' lets the number of active weights of a layer be any, and pattern={leaf.pattern} "
                    f"of {leaf.name} needs to know it: use scope='layer'."
                )
        shared = shared_densities(params, pruned, sparsity, distribution)
        numbers = [number for _, number in active_units(pruned, shared, allow_empty, keeps_total=True)]
        return Budget(None, numbers, units, allow_empty)
    if sparsity is None:
        raise ValueError(f"{who} needs sparsity=, such as sparsity=0.9.")
    sizes = {leaf.name: leaf.pattern.unit_size(leaf.layer_shape) for leaf in pruned}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            "scope='global' compares blocks of all layers, which needs blocks of one size, but pattern= makes blocks "
            f"of these numbers of weights: {sizes}. Use scope='layer'."
        )
    return Budget(tolerant_floor((1 - sparsity) * sum(units)), [], units, allow_empty)
