"""How densely each layer is to be, by one sparsity for all or one for each leaf."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optax

from agent_optax._validation import check_fraction, is_concrete_number
from agent_optax.sparsity._distribution import Distribution
from agent_optax.sparsity._matching import matched_leaves
from agent_optax.sparsity._pruned_leaf import PrunedLeaf
from agent_optax.sparsity._where import is_function


def densities(
    params: optax.Params, pruned: Sequence[PrunedLeaf], sparsity: Any, distribution: Distribution
) -> list[float]:
    """The density of each layer of each pruned leaf, in their order."""
    if is_concrete_number(sparsity):
        names = [name for leaf in pruned for name in leaf.layer_names()]
        shapes = [leaf.layer_shape for leaf in pruned for _ in range(leaf.num_layers)]
        shared = list(distribution(shapes, float(sparsity)))
        if len(shared) != len(names):
            raise ValueError(
                f"distribution= must give one density for each of the {len(names)} layers to prune, "
                f"{', '.join(names)}, got {shared!r}."
            )
        for name, density in zip(names, shared, strict=True):
            check_fraction(f"the density of {name} that distribution= gives", density, "it is a share of the layer")
        return shared
    if is_function(sparsity):
        per_leaf = [sparsity(leaf.name) for leaf in pruned]
    else:
        if isinstance(sparsity, str):
            raise ValueError(
                f"sparsity= must be a number such as 0.9, a function of names, or a tree, got {sparsity!r}."
            )
        of_each = matched_leaves(sparsity, params, "sparsity=")
        per_leaf = [of_each[leaf.index] for leaf in pruned]
    per_leaf = [0.0 if s is None else s for s in per_leaf]
    for leaf, s in zip(pruned, per_leaf, strict=True):
        check_fraction(
            f"sparsity of {leaf.name}", s, "it is the share of inactive weights, such as 0.9", below_one=True
        )
    return [1.0 - s for leaf, s in zip(pruned, per_leaf, strict=True) for _ in range(leaf.num_layers)]
