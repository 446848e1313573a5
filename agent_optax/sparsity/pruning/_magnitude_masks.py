"""Masks of the weights of largest magnitude: one-shot pruning and lottery tickets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from agent_optax.sparsity._default_axes import AxesChoice
from agent_optax.sparsity._distribution import Distribution, erk
from agent_optax.sparsity._layer import Layer
from agent_optax.sparsity._pattern import Pattern, PatternChoice
from agent_optax.sparsity._pruned_leaf import PrunedLeaf
from agent_optax.sparsity._where import kernels
from agent_optax.sparsity.pruning._largest import largest_masks


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

    def magnitudes(
        params: optax.Params, pruned: Sequence[PrunedLeaf], layers: Sequence[tuple[Pattern, Layer]]
    ) -> list[jax.Array]:
        del params, pruned
        return [jnp.abs(pattern.units(layer).weights) for pattern, layer in layers]

    return largest_masks(
        "magnitude_masks",
        params,
        magnitudes,
        sparsity,
        1,
        where,
        scope,
        distribution,
        pattern,
        axes,
        allow_empty_layers,
    )
