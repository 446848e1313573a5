"""GraSP: the weights without which the gradient would flow less."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from agent_optax._tree import wide_product
from agent_optax.sparsity._where import kernels, prunable
from agent_optax.sparsity.pruning._score_masks import NetworkScore


def grasp(loss_fn: Callable[[optax.Params, Any], jax.Array], batch: Any, where: Any = kernels) -> NetworkScore:
    r"""GraSP, for `score_masks`: what the removal of a weight takes from the gradient flow :math:`g^\top g`.

    .. math::
        s = \theta \odot H g, \qquad g = \nabla L(\theta), \quad H = \nabla^2 L(\theta)

    To first order the flow falls by twice that when a weight is set to zero, so the largest are kept. The paper ranks
    by :math:`-\theta \odot H g` and removes the largest, which is the same. Scores have either sign. The product
    :math:`H g` costs about three gradients, and H is never formed.

    Args:
        loss_fn: ``loss_fn(params, batch)``, a scalar. The published code divides logits by a temperature of 200 in it.
        batch: training data: ten samples a class in the published code.
        where: the leaves that g and H are of: as passed to `score_masks`. Default `kernels`: biases and normalization
            are held, as in the published code.

    Returns:
        A score for `score_masks`.

    Example:
        >>> import agent_optax, jax, jax.numpy as jnp
        >>> params = {"kernel": jax.random.normal(jax.random.key(0), (8, 4)), "bias": jnp.zeros(4)}
        >>> loss_fn = lambda params, batch: jnp.mean(jnp.tanh(batch @ params["kernel"] + params["bias"]) ** 2)
        >>> masks = agent_optax.score_masks(agent_optax.grasp(loss_fn, jnp.eye(8)), params, sparsity=0.75)
        >>> int(masks["kernel"].sum())
        8

    References:
        Wang, Zhang and Grosse, Picking Winning Tickets Before Training by Preserving Gradient Flow, ICLR 2020.
    """

    def score(params: optax.Params) -> Any:
        leaves, treedef = jax.tree.flatten(params)
        chosen = [i for i, is_chosen in enumerate(jax.tree.leaves(prunable(params, where))) if is_chosen]

        def loss(weights: list[jax.Array]) -> jax.Array:
            merged = list(leaves)
            for i, w in zip(chosen, weights, strict=True):
                merged[i] = w
            return loss_fn(treedef.unflatten(merged), batch)

        weights = [leaves[i] for i in chosen]
        gradient = jax.grad(loss)
        _, products = jax.jvp(gradient, (weights,), (gradient(weights),))
        scores: list[Any] = [None] * len(leaves)
        for i, w, product in zip(chosen, weights, products, strict=True):
            scores[i] = wide_product(w, product)
        return treedef.unflatten(scores)

    return score
