"""The masks with which training starts, and the numbers of active weights that it ends with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from agent_optax._tree import is_masked
from agent_optax._validation import is_concrete_number
from agent_optax.sparsity._distribution import Distribution
from agent_optax.sparsity._equal_layers import map_layers
from agent_optax.sparsity._floors import with_floors
from agent_optax.sparsity._layer import Target
from agent_optax.sparsity._pattern import Pattern
from agent_optax.sparsity._sparse_optimizer import PrunedLeaf
from agent_optax.sparsity._topology import Topology
from agent_optax.sparsity._where import densities

Shape = tuple[int, ...]


class Start(NamedTuple):
    """What `sparsify` starts from."""

    masks: Any  # like params, bool; MaskedNode where nothing is pruned
    counts: Any  # like masks, int: active weights; None where they are not known
    targets: list[Target]  # of the pruned leaves, in their order


def random_start(
    params: optax.Params,
    chosen: Any,
    pruned: Sequence[PrunedLeaf],
    sparsity: Any,
    initial_sparsity: float | None,
    distribution: Distribution,
    allow_empty: bool,
    key: jax.Array,
) -> Start:
    """Random masks of the patterns; an initial sparsity says where they start, never sparser than they end."""
    leaves, treedef = jax.tree.flatten(params)
    shapes = [jnp.shape(leaves[leaf.index]) for leaf in pruned]
    patterns = [leaf.pattern for leaf in pruned]
    shared = _shared_densities(params, chosen, pruned, sparsity, distribution)
    targets, numbers = _targets(pruned, shapes, shared, allow_empty, keeps_total=is_concrete_number(sparsity))
    if initial_sparsity is not None:
        initial = [density for _, density in densities(params, chosen, initial_sparsity, distribution)]
        numbers = [
            max(number, pattern.count(shape, density))
            for number, pattern, shape, density in zip(numbers, patterns, shapes, initial, strict=True)
        ]

    def random_mask(kind: tuple[Pattern, int], like: jax.Array, key: jax.Array) -> tuple[jax.Array, tuple[()]]:
        pattern, number = kind
        return pattern.random_mask(number, like, key), ()

    indices = jnp.asarray([leaf.index for leaf in pruned], jnp.int32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, indices)
    masks, _ = map_layers(
        random_mask, list(zip(patterns, numbers, strict=True)), [leaves[leaf.index] for leaf in pruned], keys
    )
    tree = list[Any]([optax.MaskedNode()] * len(leaves))
    counts = list(tree)
    for leaf, mask, number in zip(pruned, masks, numbers, strict=True):
        tree[leaf.index], counts[leaf.index] = mask, number
    return Start(treedef.unflatten(tree), treedef.unflatten(counts), targets)


def given_start(
    params: optax.Params,
    masks: Any,
    originals: Sequence[Any],
    pruned: Sequence[PrunedLeaf],
    sparsity: Any,
    distribution: Distribution,
    allow_empty: bool,
    topology: Topology,
    needs_counts: bool,
) -> Start:
    """Given masks; they end with their own numbers of active weights, or at `sparsity` if the topology prunes."""
    given = jax.tree.leaves(masks)
    patterns = [leaf.pattern for leaf in pruned]
    for mask, leaf in zip(given, pruned, strict=True):
        if _is_surely_false(leaf.pattern.allows(mask)):
            raise ValueError(
                f"masks= does not have the pattern {leaf.pattern} in {leaf.name}: correct the mask, or drop pattern=."
            )
    if topology.initial_sparsity is None:
        units = [pattern.unit_size(mask.shape) for mask, pattern in zip(given, patterns, strict=True)]
        targets = [
            Target(mask.size // unit, None, jnp.sum(mask, dtype=jnp.int32) // unit)
            for mask, unit in zip(given, units, strict=True)
        ]
    else:
        chosen = jax.tree.map(lambda _, m: not is_masked(m), params, masks)
        shared = _shared_densities(params, chosen, pruned, sparsity, distribution)
        shapes = [mask.shape for mask in given]
        targets, _ = _targets(pruned, shapes, shared, allow_empty, keeps_total=is_concrete_number(sparsity))
        _check_not_sparser(pruned, originals, targets, topology.counts_jointly)
    counts = jax.tree.structure(masks).unflatten(map(_concrete_count, originals)) if needs_counts else None
    return Start(masks, counts, targets)


def _is_surely_false(truth: jax.Array) -> bool:
    try:
        return not truth
    except jax.errors.TracerBoolConversionError:
        return False


def _shared_densities(
    params: optax.Params, chosen: Any, pruned: Sequence[PrunedLeaf], sparsity: Any, distribution: Distribution
) -> list[float]:
    """The density of each pruned leaf; without a sparsity those that the patterns fix."""
    if sparsity is not None:
        return [density for _, density in densities(params, chosen, sparsity, distribution)]
    fixed = []
    for leaf in pruned:
        if leaf.pattern.density is None:
            raise ValueError(
                f"sparsify needs sparsity=, such as sparsity=0.9: {leaf.name} has the pattern {leaf.pattern}, which "
                "fixes none."
            )
        fixed.append(leaf.pattern.density)
    return fixed


def _targets(
    pruned: Sequence[PrunedLeaf],
    shapes: Sequence[Shape],
    shared: Sequence[float],
    allow_empty: bool,
    keeps_total: bool,
) -> tuple[list[Target], list[int]]:
    """The targets, and the numbers of active weights; a pattern may fix the density."""
    fixed = [leaf.pattern.density for leaf in pruned]
    density_of = [share if density is None else density for share, density in zip(shared, fixed, strict=True)]
    units = [leaf.pattern.unit_size(shape) for leaf, shape in zip(pruned, shapes, strict=True)]
    numbers = [leaf.pattern.count(shape, d) for leaf, shape, d in zip(pruned, shapes, density_of, strict=True)]
    sizes = [math.prod(shape) for shape in shapes]
    floors = [
        number if density is not None else 0 if allow_empty else min(unit, size)
        for number, density, unit, size in zip(numbers, fixed, units, sizes, strict=True)
    ]
    raised = with_floors([leaf.name for leaf in pruned], numbers, floors, units, keeps_total)
    targets = [
        Target(size // unit, density if number == before else number / size, number // unit)
        for size, unit, density, number, before in zip(sizes, units, density_of, raised, numbers, strict=True)
    ]
    return targets, raised


def _check_not_sparser(
    pruned: Sequence[PrunedLeaf], originals: Sequence[Any], targets: Sequence[Target], is_joint: bool
) -> None:
    """Raises ValueError if masks, where they are known, have fewer active weights than pruning ends with."""
    try:
        starts = [_concrete_count(mask) for mask in originals]
    except ValueError:  # traced
        return
    ends = [
        int(target.num_active) * leaf.pattern.unit_size(np.shape(mask))
        for target, leaf, mask in zip(targets, pruned, originals, strict=True)
    ]
    names = [leaf.name for leaf in pruned]
    if is_joint:
        names, starts, ends = ["all leaves together"], [sum(starts)], [sum(ends)]
    for name, start, end in zip(names, starts, ends, strict=True):
        if start < end:
            raise ValueError(
                f"masks= starts with {start} active weights in {name}, fewer than the {end} with which pruning would "
                "end at sparsity=: pruning never makes weights active again. Pass a higher sparsity=, or masks that "
                "start denser."
            )


def _concrete_count(mask: Any) -> int:
    try:
        return int(np.count_nonzero(np.asarray(mask)))
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
        raise ValueError(
            "storage='compact' fixes the number of active weights when it is built, so masks= must be known then: "
            "pass plain arrays, not values traced by jax.jit or jax.vmap."
        ) from error
