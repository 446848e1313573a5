"""Masks of the weights of largest score, whatever the score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from agent_optax._tree import wide_dtype
from agent_optax._validation import check_positive_int
from agent_optax.sparsity._default_axes import AxesChoice
from agent_optax.sparsity._distribution import Distribution, erk
from agent_optax.sparsity._layer import Layer
from agent_optax.sparsity._matching import matched_leaves
from agent_optax.sparsity._pattern import Pattern, PatternChoice
from agent_optax.sparsity._pruned_leaf import PrunedLeaf
from agent_optax.sparsity._where import kernels
from agent_optax.sparsity.pruning._largest import largest_masks

NetworkScore = Callable[[optax.Params], Any]  # params -> a tree like them of scores, or None where it has none


def score_masks(
    score: NetworkScore,
    params: optax.Params,
    sparsity: float | None = None,
    *,
    rounds: int = 1,
    where: Any = kernels,
    scope: Literal["global", "layer"] = "global",
    distribution: Distribution = erk,
    pattern: PatternChoice = None,
    axes: AxesChoice = None,
    allow_empty_layers: bool = False,
) -> Any:
    r"""Masks of the weights of largest score, for ``sparsify(..., masks=)``: pruning at one point of training.

    Before training, by `snip`, `grasp` or `synflow`; after it, by `wanda`; or by any function of the parameters. In
    `rounds` n the network is pruned n times, each time by the scores of what the time before has left, and after the
    k-th time the share

    .. math::
        d^{\,k / n}, \qquad d = 1 - s

    of the weights is active: of all of them together, or with ``scope="layer"`` of each layer, d being its density.

    Args:
        score: a function of params that returns a tree like them: an array of scores for each leaf to prune, None or
            anything elsewhere. With ``rounds > 1`` it must be traceable by JAX, and sees params whose inactive weights
            are zero.
        params: a tree of arrays.
        sparsity: s, the share of inactive weights over all pruned leaves, in [0, 1). Default None: as `pattern` fixes.
        rounds: n. Default 1: all at once (SNIP, GraSP). SynFlow takes 100.
        where: the leaves to prune, as for `sparsify`. Default `kernels`.
        scope: ``"global"`` (default, as in the papers of SNIP, GraSP and SynFlow): the :math:`\lfloor d\,N \rfloor`
            largest of all N weights together. ``"layer"``: the largest of each layer.
        distribution: shares the sparsity among layers, for ``scope="layer"``. Default `erk`, as for `sparsify`.
        pattern: which masks are allowed, as for `sparsify`: blocks are ranked by the mean of their scores, and of each
            group of `n_m` or `fan_in` the largest are kept. In rounds, the best of each group are safe, and the pattern
            holds after the last. Default None: unstructured.
        axes: what the axes of leaves are, as for `sparsify`. Default None: by the conventions of Flax.
        allow_empty_layers: whether a layer may lose all its weights, as in the published code. By default each keeps
            its largest at least, counted against the others.

    Returns:
        A tree like `params` of bool arrays, None where nothing is pruned.

    Raises:
        ValueError: as `magnitude_masks`, or if a leaf to prune has no score, one of another shape, or one that is not
            finite.
        TypeError: if `score` is not callable.

    Example:
        >>> import agent_optax, jax.numpy as jnp
        >>> params = {"kernel": jnp.array([[3.0, -1.0], [0.5, -2.0]]), "bias": jnp.zeros(2)}
        >>> loss_fn = lambda params, batch: jnp.sum((batch @ params["kernel"] + params["bias"]) ** 2)
        >>> snip = agent_optax.snip(loss_fn, jnp.array([[1.0, 0.1]]))
        >>> agent_optax.score_masks(snip, params, sparsity=0.5)["kernel"].tolist()
        [[True, True], [False, False]]

    References:
        Tanaka et al., Pruning Neural Networks Without Any Data by Iteratively Conserving Synaptic Flow, NeurIPS 2020,
        for the rounds.
    """
    if not callable(score):
        raise TypeError(f"score must be a function of params such as agent_optax.snip(loss_fn, batch), got {score!r}.")
    check_positive_int("rounds", rounds, "it counts how often the network is pruned")

    def unit_scores(
        params: optax.Params, pruned: Sequence[PrunedLeaf], layers: Sequence[tuple[Pattern, Layer]]
    ) -> list[jax.Array]:
        of_layers = [
            layer
            for leaf, scores in zip(pruned, _scores_of(score, params, pruned), strict=True)
            for layer in leaf.axes.unstacked(scores)
        ]
        units = [
            pattern.units(layer._replace(statistic=scores)).statistic
            for (pattern, layer), scores in zip(layers, of_layers, strict=True)
        ]
        return [unit for unit in units if unit is not None]

    return largest_masks(
        "score_masks",
        params,
        unit_scores,
        sparsity,
        rounds,
        where,
        scope,
        distribution,
        pattern,
        axes,
        allow_empty_layers,
    )


def _scores_of(score: NetworkScore, params: optax.Params, pruned: Sequence[PrunedLeaf]) -> list[jax.Array]:
    """The scores of each pruned leaf; ValueError where there are none, or where they cannot be compared."""
    found = matched_leaves(score(params), params, "what score= returns", is_part=True)
    scores = []
    for leaf in pruned:
        own = found[leaf.index]
        if own is None or jnp.shape(own) != leaf.shape:
            got = "None" if own is None else f"the shape {list(jnp.shape(own))}"
            raise ValueError(
                f"score= must return an array of the shape {list(leaf.shape)} for {leaf.name or 'the parameter'}, got "
                f"{got}: choose leaves that have scores with where=agent_optax.named(...), say."
            )
        own = jnp.asarray(own)
        own = own.astype(wide_dtype(own.dtype) if jnp.issubdtype(own.dtype, jnp.floating) else jnp.float32)
        if not isinstance(own, Tracer) and not bool(jnp.all(jnp.isfinite(own))):
            raise ValueError(
                f"the scores of {leaf.name or 'the parameter'} are not all finite: they overflow or divide by zero, "
                "or a weight is not finite. In deep networks compute them in double precision, under "
                "jax.enable_x64(True)."
            )
        scores.append(own)
    return scores
