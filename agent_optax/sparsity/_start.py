"""The masks with which training starts, and the numbers of active weights that it ends with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from agent_optax._validation import is_concrete_number
from agent_optax.sparsity._axes import Axes, Shape
from agent_optax.sparsity._densities import densities
from agent_optax.sparsity._distribution import Distribution
from agent_optax.sparsity._equal_layers import in_one_program, map_layers
from agent_optax.sparsity._floors import Floor, with_floors
from agent_optax.sparsity._layer import Layer, Target
from agent_optax.sparsity._pattern import Pattern
from agent_optax.sparsity._pruned_leaf import PrunedLeaf
from agent_optax.sparsity._topology import Topology
from agent_optax.sparsity.selection._top_k import num_true


class Start(NamedTuple):
    """What `sparsify` starts from."""

    masks: Any  # like params, bool; MaskedNode where nothing is pruned
    counts: Any  # like masks, int: active weights; None where they are not known
    targets: list[Target]  # of the layers of the pruned leaves, in their order


def random_start(
    params: optax.Params,
    pruned: Sequence[PrunedLeaf],
    sparsity: Any,
    initial_sparsity: float | None,
    distribution: Distribution,
    allow_empty: bool,
    key: jax.Array,
) -> Start:
    """Random masks of the patterns; an initial sparsity says where they start, never sparser than they end."""
    leaves, treedef = jax.tree.flatten(params)
    shared = shared_densities(params, pruned, sparsity, distribution)
    densities_and_numbers = active_units(pruned, shared, allow_empty, keeps_total=is_concrete_number(sparsity))
    starts = [number for _, number in densities_and_numbers]
    if initial_sparsity is not None:
        initial = densities(params, pruned, initial_sparsity, distribution)
        of_each = zip(starts, _pattern_of_each_layer(pruned), initial, strict=True)
        starts = [max(number, pattern.count(shape, density)) for number, (pattern, shape), density in of_each]
    targets = [
        Target(pattern.num_units(shape), density, number, start)
        for (pattern, shape), (density, number), start in zip(
            _pattern_of_each_layer(pruned), densities_and_numbers, starts, strict=True
        )
    ]
    remaining = iter(starts)
    of_leaf = [tuple(next(remaining) for _ in range(leaf.num_layers)) for leaf in pruned]
    kinds = tuple((leaf.pattern, leaf.axes, own) for leaf, own in zip(pruned, of_leaf, strict=True))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray([leaf.index for leaf in pruned], jnp.int32))
    masks = in_one_program(_random_masks, kinds, [leaves[leaf.index] for leaf in pruned], keys)
    tree = list[Any]([optax.MaskedNode()] * len(leaves))
    counts = list(tree)
    for leaf, mask, own in zip(pruned, masks, of_leaf, strict=True):
        tree[leaf.index] = mask
        entries = [leaf.pattern.num_entries(leaf.layer_shape, number) for number in own]
        counts[leaf.index] = None if None in entries else sum(n for n in entries if n is not None)
    return Start(treedef.unflatten(tree), treedef.unflatten(counts), targets)


def _random_masks(
    kinds: tuple[tuple[Pattern, Axes, tuple[int, ...]], ...], likes: list[jax.Array], keys: jax.Array
) -> list[jax.Array]:
    return map_layers(_random_mask, kinds, likes, keys)[0]


def _random_mask(
    kind: tuple[Pattern, Axes, tuple[int, ...]], like: jax.Array, key: jax.Array
) -> tuple[jax.Array, tuple[()]]:
    """A mask with these numbers of active units in the layers of a leaf."""
    pattern, axes, numbers = kind
    if len(set(numbers)) == 1:

        def random_mask(layer: Layer, key: jax.Array) -> jax.Array:
            return pattern.random_mask(numbers[0], layer.mask, key)

        blank = jnp.zeros_like(like, dtype=bool)
        return axes.on_each_layer(random_mask, Layer(like, blank, like, None), key, like), ()
    masks = [
        pattern.random_mask(number, layer, jax.random.fold_in(key, i))
        for i, (number, layer) in enumerate(zip(numbers, axes.unstacked(like), strict=True))
    ]
    return axes.restacked(masks, like), ()


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
    starts: list[jax.Array] = []
    with jax.ensure_compile_time_eval():  # known masks are looked at also inside jax.jit
        for mask, leaf in zip(originals, pruned, strict=True):
            layers = leaf.axes.unstacked(jnp.asarray(mask, bool))
            for name, layer in zip(leaf.layer_names(), layers, strict=True):
                if _is_surely_false(leaf.pattern.allows(layer)):
                    raise ValueError(
                        f"masks= does not have the pattern {leaf.pattern} in {name}: correct the mask, or drop "
                        "pattern=."
                    )
            starts += [_num_active(leaf.pattern, layer) for layer in layers]
    of_each = _pattern_of_each_layer(pruned)
    if topology.initial_sparsity is None:
        targets = [
            Target(pattern.num_units(shape), None, number, number)
            for (pattern, shape), number in zip(of_each, starts, strict=True)
        ]
    else:
        shared = shared_densities(params, pruned, sparsity, distribution)
        ends = active_units(pruned, shared, allow_empty, keeps_total=is_concrete_number(sparsity))
        targets = [
            Target(pattern.num_units(shape), density, end, start)
            for (pattern, shape), (density, end), start in zip(of_each, ends, starts, strict=True)
        ]
        _check_not_sparser(pruned, targets, topology.counts_jointly)
    counts = jax.tree.structure(masks).unflatten(map(_concrete_count, originals)) if needs_counts else None
    return Start(masks, counts, targets)


def _num_active(pattern: Pattern, mask: jax.Array) -> jax.Array:
    """int32: the active units in the mask of a layer."""
    weights = mask.astype(jnp.float32)
    return num_true(pattern.units(Layer(weights, mask, weights, None)).mask)


def _is_surely_false(truth: jax.Array) -> bool:
    try:
        return not truth
    except jax.errors.TracerBoolConversionError:
        return False


def shared_densities(
    params: optax.Params, pruned: Sequence[PrunedLeaf], sparsity: Any, distribution: Distribution
) -> list[float]:
    """The density of each layer; without a sparsity those that the patterns fix."""
    if sparsity is not None:
        return densities(params, pruned, sparsity, distribution)
    fixed = []
    for leaf in pruned:
        if leaf.pattern.density is None:
            raise ValueError(
                f"sparsify needs sparsity=, such as sparsity=0.9: {leaf.name} has the pattern {leaf.pattern}, which "
                "fixes none."
            )
        fixed += [leaf.pattern.density] * leaf.num_layers
    return fixed


def _pattern_of_each_layer(pruned: Sequence[PrunedLeaf]) -> list[tuple[Pattern, Shape]]:
    """The pattern and shape of each layer."""
    return [(leaf.pattern, leaf.layer_shape) for leaf in pruned for _ in range(leaf.num_layers)]


def active_units(
    pruned: Sequence[PrunedLeaf], shared: Sequence[float], allow_empty: bool, keeps_total: bool
) -> list[tuple[float, int]]:
    """The density and the number of active units of each layer; a pattern may fix the density."""
    layers = _pattern_of_each_layer(pruned)
    names = [name for leaf in pruned for name in leaf.layer_names()]
    density_of = [
        share if pattern.density is None else pattern.density
        for (pattern, _), share in zip(layers, shared, strict=True)
    ]
    numbers, floors = [], []
    for name, (pattern, shape), density in zip(names, layers, density_of, strict=True):
        number = pattern.count(shape, density)
        if number > pattern.most(shape):
            raise ValueError(
                f"{name} is to have the density {density:.4g}, and pattern={pattern} allows "
                f"{pattern.most(shape) / pattern.num_units(shape):.4g} at most: pass a higher sparsity=, "
                "distribution=agent_optax.uniform, or give patterns leaf by leaf with a callable on the path."
            )
        fewest = number if pattern.density is not None else 0 if allow_empty else pattern.step(shape)
        numbers.append(number)
        floors.append(Floor(name, min(fewest, pattern.num_units(shape)), pattern.step(shape), pattern.unit_size(shape)))
    raised = with_floors(numbers, floors, keeps_total)
    return [
        (density if number == before else number / pattern.num_units(shape), number)
        for (pattern, shape), density, number, before in zip(layers, density_of, raised, numbers, strict=True)
    ]


def _check_not_sparser(pruned: Sequence[PrunedLeaf], targets: Sequence[Target], is_joint: bool) -> None:
    """Raises ValueError if masks, where they are known, have fewer active weights than pruning ends with."""
    if any(isinstance(target.num_start, Tracer) for target in targets):
        return
    names = [name for leaf in pruned for name in leaf.layer_names()]
    sizes = [pattern.unit_size(shape) for pattern, shape in _pattern_of_each_layer(pruned)]
    starts = [int(target.num_start) * size for target, size in zip(targets, sizes, strict=True)]
    ends = [int(target.num_active) * size for target, size in zip(targets, sizes, strict=True)]
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
