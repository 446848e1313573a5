"""SNIP: the connections to which the loss is most sensitive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from agent_optax._tree import wide_product
from agent_optax.sparsity.pruning._score_masks import NetworkScore


def snip(loss_fn: Callable[[optax.Params, Any], jax.Array], batch: Any) -> NetworkScore:
    r"""SNIP, for `score_masks`: connection sensitivity, how much the loss changes with the presence of a weight.

    .. math::
        s_j = \left| \frac{\partial L(c \odot w)}{\partial c_j} \right|_{c = 1} = |w_j\, g_j|, \qquad g = \nabla L(w)

    The paper divides by the sum of all scores, which changes no rank. It prunes at initialization, all layers together
    and all at once: the defaults of `score_masks`. In rounds it is iterative SNIP.

    Args:
        loss_fn: ``loss_fn(params, batch)``, a scalar. A model with further state is called with it inside.
        batch: training data: one batch in the paper. Take one as large as memory allows, or of ten samples a class.

    Returns:
        A score for `score_masks`.

    Example:
        >>> import agent_optax, jax, jax.numpy as jnp, optax
        >>> params = {"kernel": jax.random.normal(jax.random.key(0), (8, 4))}
        >>> loss_fn = lambda params, batch: jnp.mean((batch @ params["kernel"]) ** 2)
        >>> masks = agent_optax.score_masks(agent_optax.snip(loss_fn, jnp.eye(8)), params, sparsity=0.75)
        >>> tx = agent_optax.sparsify(optax.sgd(0.1), agent_optax.static(), masks=masks)

    References:
        Lee, Ajanthan and Torr, SNIP: Single-Shot Network Pruning Based on Connection Sensitivity, ICLR 2019, section
        4.1; de Jorge et al., Progressive Skeletonization, ICLR 2021, for the rounds.
    """

    def score(params: optax.Params) -> Any:
        return jax.tree.map(lambda w, g: jnp.abs(wide_product(w, g)), params, jax.grad(loss_fn)(params, batch))

    return score
