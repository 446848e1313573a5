"""Masks of the weights of largest magnitude: one-shot pruning and lottery tickets."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from agent_optax._validation import check_fraction, is_concrete_number
from agent_optax.sparsity._distribution import Distribution, erk
from agent_optax.sparsity._floors import with_floors
from agent_optax.sparsity._rounding import tolerant_floor
from agent_optax.sparsity._where import check_sizes, densities, kernels, leaf_names, prunable
from agent_optax.sparsity.selection._top_k import select, select_from_all, select_jointly


def magnitude_masks(
    params: optax.Params,
    sparsity: float,
    *,
    where: Any = kernels,
    scope: Literal["global", "layer"] = "global",
    distribution: Distribution = erk,
    allow_empty_layers: bool = False,
) -> Any:
    r"""Masks of the weights of largest magnitude: a lottery ticket, for ``sparsify(..., masks=)``.

    Train a dense network, take the masks of its weights, and train the weights from which it started:
    ``sparsify(inner, static(), masks=magnitude_masks(trained, 0.9))``. Given the weights at the start, it is one-shot
    magnitude pruning before training.

    Args:
        params: a tree of arrays.
        sparsity: s, the share of inactive weights over all pruned leaves, in [0, 1).
        where: the leaves to prune, as for `sparsify`. Default `kernels`.
        scope: ``"global"`` (default, as in the published code): the :math:`\lfloor (1 - s)\,n \rfloor` largest of all
            n weights together. ``"layer"``: the largest of each leaf.
        distribution: shares the sparsity among leaves, for ``scope="layer"``. Default `erk`, as for `sparsify`.
        allow_empty_layers: whether a leaf may lose all its weights, as in the published code. By default each keeps its
            largest at least, counted against the others.

    Returns:
        A tree like `params` of bool arrays, None where nothing is pruned.

    Raises:
        ValueError: if `sparsity` is outside [0, 1), `scope` is unknown, or `where` selects nothing.

    Example:
        >>> import agent_optax, jax.numpy as jnp
        >>> params = {"kernel": jnp.array([[3.0, -1.0], [0.5, -2.0]]), "bias": jnp.zeros(2)}
        >>> masks = agent_optax.magnitude_masks(params, sparsity=0.5)
        >>> masks["kernel"].tolist(), masks["bias"]
        ([[True, False], [False, True]], None)

    References:
        Frankle and Carbin, The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks, ICLR 2019.
    """
    check_fraction("sparsity", sparsity, "it is the share of inactive weights, such as 0.9", below_one=True)
    if scope not in ("global", "layer"):
        raise ValueError(f"scope must be 'global' or 'layer', got {scope!r}.")
    chosen = prunable(params, where)
    leaves, treedef = jax.tree.flatten(params)
    is_pruned = jax.tree.leaves(chosen)
    scores = [jnp.abs(leaf) for leaf, c in zip(leaves, is_pruned, strict=True) if c]
    names = [name for name, c in zip(leaf_names(params), is_pruned, strict=True) if c]
    sizes = [score.size for score in scores]
    check_sizes(dict(zip(names, sizes, strict=True)), counts_jointly=scope == "global")
    if scope == "global":
        number = tolerant_floor((1 - sparsity) * sum(sizes))
        everywhere = [jnp.ones_like(score, dtype=bool) for score in scores]
        masks = select_jointly(scores, number) if allow_empty_layers else select_from_all(scores, number, everywhere)
    else:
        shares = densities(params, chosen, sparsity, distribution)
        numbers = [round(share * size) for size, (_, share) in zip(sizes, shares, strict=True)]
        floors = [min(int(not allow_empty_layers), size) for size in sizes]
        numbers = with_floors(names, numbers, floors, [1] * len(sizes), is_concrete_number(sparsity))
        masks = [select(score, number) for score, number in zip(scores, numbers, strict=True)]
    remaining = iter(masks)
    return treedef.unflatten([next(remaining) if c else None for c in is_pruned])
