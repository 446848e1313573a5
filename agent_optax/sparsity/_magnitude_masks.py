"""Masks of the weights of largest magnitude: one-shot pruning and lottery tickets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from agent_optax._validation import check_fraction
from agent_optax.sparsity._default_axes import AxesChoice, check_axes
from agent_optax.sparsity._distribution import Distribution, erk
from agent_optax.sparsity._layer import Layer
from agent_optax.sparsity._pattern import PatternChoice, check_pattern, fixed_sparsity
from agent_optax.sparsity._pruned_leaf import PrunedLeaf, pruned_leaves
from agent_optax.sparsity._rounding import tolerant_floor
from agent_optax.sparsity._start import active_units, shared_densities
from agent_optax.sparsity._where import check_sizes, kernels, prunable
from agent_optax.sparsity.selection._top_k import select, select_from_all, select_jointly


def magnitude_masks(
    params: optax.Params,
    sparsity: float | None = None,
    *,
    where: Any = kernels,
    scope: Literal["global", "layer"] = "global",
    distribution: Distribution = erk,
    pattern: PatternChoice = None,
    axes: AxesChoice = None,
    allow_empty_layers: bool = False,
) -> Any:
    r"""Masks of the weights of largest magnitude: a lottery ticket, for ``sparsify(..., masks=)``.

    Train a dense network, take the masks of its weights, and train the weights from which it started:
    ``sparsify(inner, static(), masks=magnitude_masks(trained, 0.9))``. Given the weights at the start, it is one-shot
    magnitude pruning before training.

    Args:
        params: a tree of arrays.
        sparsity: s, the share of inactive weights over all pruned leaves, in [0, 1). Default None: as `pattern` fixes.
        where: the leaves to prune, as for `sparsify`. Default `kernels`.
        scope: ``"global"`` (default, as in the published code): the :math:`\lfloor (1 - s)\,n \rfloor` largest of all
            n weights together. ``"layer"``: the largest of each layer.
        distribution: shares the sparsity among layers, for ``scope="layer"``. Default `erk`, as for `sparsify`.
        pattern: which masks are allowed, as for `sparsify`: blocks are ranked by their root mean square, and of each
            group of `n_m` or `fan_in` the largest are kept. Default None: unstructured.
        axes: what the axes of leaves are, as for `sparsify`. Default None: by the conventions of Flax.
        allow_empty_layers: whether a layer may lose all its weights, as in the published code. By default each keeps
            its largest at least, counted against the others.

    Returns:
        A tree like `params` of bool arrays, None where nothing is pruned.

    Raises:
        ValueError: if `sparsity` is missing or outside [0, 1), `scope` is unknown, `where` selects nothing, a leaf
            cannot have the pattern, or ``scope="global"`` and `pattern` fixes a number in each layer that depends on
            its density.

    Example:
        >>> import agent_optax, jax.numpy as jnp
        >>> params = {"kernel": jnp.array([[3.0, -1.0], [0.5, -2.0]]), "bias": jnp.zeros(2)}
        >>> masks = agent_optax.magnitude_masks(params, sparsity=0.5)
        >>> masks["kernel"].tolist(), masks["bias"]
        ([[True, False], [False, True]], None)

    References:
        Frankle and Carbin, The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks, ICLR 2019.
    """
    check_pattern(pattern)
    check_axes(axes)
    sparsity = fixed_sparsity(sparsity, pattern)
    if sparsity is not None:
        check_fraction("sparsity", sparsity, "it is the share of inactive weights, such as 0.9", below_one=True)
    if scope not in ("global", "layer"):
        raise ValueError(f"scope must be 'global' or 'layer', got {scope!r}.")
    leaves, treedef = jax.tree.flatten(params)
    pruned = pruned_leaves(params, jax.tree.leaves(prunable(params, where)), pattern, axes)
    layers = [
        (leaf.pattern, Layer(layer, jnp.ones_like(layer, dtype=bool), layer, None))
        for leaf in pruned
        for layer in leaf.axes.unstacked(jnp.asarray(leaves[leaf.index]))
    ]
    units = [pattern.units(layer) for pattern, layer in layers]
    if scope == "global" and not any(leaf.pattern.has_groups for leaf in pruned):
        masks = _largest_of_all(pruned, units, sparsity, allow_empty_layers)
    else:
        masks = _largest_of_each(params, pruned, units, sparsity, distribution, scope, allow_empty_layers)
    entries = iter(pattern.entries(mask, layer.mask) for (pattern, layer), mask in zip(layers, masks, strict=True))
    found: list[Any] = [None] * len(leaves)
    for leaf in pruned:
        own = [next(entries) for _ in range(leaf.num_layers)]
        found[leaf.index] = leaf.axes.restacked(own, jnp.asarray(leaves[leaf.index]))
    return treedef.unflatten(found)


def _largest_of_all(
    pruned: Sequence[PrunedLeaf], units: Sequence[Layer], sparsity: float | None, allow_empty: bool
) -> list[jax.Array]:
    if sparsity is None:
        raise ValueError("magnitude_masks needs sparsity=, such as sparsity=0.9.")
    check_sizes({leaf.name: math.prod(leaf.shape) for leaf in pruned}, counts_jointly=True)
    sizes = {leaf.name: leaf.pattern.unit_size(leaf.layer_shape) for leaf in pruned}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            "scope='global' compares blocks of all layers, which needs blocks of one size, but pattern= makes blocks "
            f"of these numbers of weights: {sizes}. Use scope='layer'."
        )
    scores = [jnp.abs(layer.weights) for layer in units]
    number = tolerant_floor((1 - sparsity) * sum(score.size for score in scores))
    if allow_empty:
        return select_jointly(scores, number)
    return select_from_all(scores, number, [layer.mask for layer in units])


def _largest_of_each(
    params: optax.Params,
    pruned: Sequence[PrunedLeaf],
    units: Sequence[Layer],
    sparsity: float | None,
    distribution: Distribution,
    scope: str,
    allow_empty: bool,
) -> list[jax.Array]:
    check_sizes({leaf.name: math.prod(leaf.shape) for leaf in pruned}, counts_jointly=False)
    for leaf in pruned:
        if scope == "global" and leaf.pattern.density is None:
            raise ValueError(
                f"scope='global' lets the number of active weights of a layer be any, and pattern={leaf.pattern} of "
                f"{leaf.name} needs to know it: use scope='layer'."
            )
    shared = shared_densities(params, pruned, sparsity, distribution)
    numbers = active_units(pruned, shared, allow_empty, keeps_total=True)
    masks = []
    for layer, (_, number) in zip(units, numbers, strict=True):
        scores = jnp.abs(layer.weights)
        if layer.groups is None:
            masks.append(select(scores, number))
        else:
            masks.append(layer.groups.best(scores, number))
    return masks
