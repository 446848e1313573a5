"""SynFlow: the flow through a weight, without data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from agent_optax._tree import wide_dtype, wide_product
from agent_optax.sparsity.pruning._score_masks import NetworkScore


def synflow(apply_fn: Callable[[optax.Params, Any], Any], inputs: Any) -> NetworkScore:
    r"""SynFlow, for `score_masks` with ``rounds=100``: the flow from inputs to outputs through each weight.

    .. math::
        s = \left| \theta \odot \frac{\partial R}{\partial \theta} \right|, \qquad
        R = \mathbb 1^\top f(|\theta|, \mathbb 1)

    where f is the network, with the absolute values of its parameters, on inputs of ones: for a network of linear
    layers and ReLUs :math:`R = \mathbb 1^\top \prod_l |W_l|\, \mathbb 1`, and the scores that enter a unit sum up to
    those that leave it. No data is looked at. Layers survive only if pruned in many rounds, hence ``rounds=100``.

    Args:
        apply_fn: ``apply_fn(params, inputs)``, the outputs: as at evaluation, with dropout off, and normalization by
            the statistics at the start, which change nothing.
        inputs: an example, for the shapes alone: any array or tree of them, as `apply_fn` takes it.

    Returns:
        A score for `score_masks`. In networks of many layers R overflows float32; `score_masks` says so then.

    Example:
        >>> import agent_optax, jax, jax.numpy as jnp
        >>> keys = jax.random.split(jax.random.key(0))
        >>> params = [jax.random.normal(keys[0], (8, 16)), jax.random.normal(keys[1], (16, 4))]
        >>> apply_fn = lambda params, x: jax.nn.relu(x @ params[0]) @ params[1]
        >>> flow = agent_optax.synflow(apply_fn, jnp.zeros((1, 8)))
        >>> masks = agent_optax.score_masks(flow, params, sparsity=0.75, rounds=100)
        >>> sum(int(mask.sum()) for mask in masks)
        48

    References:
        Tanaka et al., Pruning Neural Networks Without Any Data by Iteratively Conserving Synaptic Flow, NeurIPS 2020,
        algorithm 1.
    """
    ones = jax.tree.map(jnp.ones_like, inputs)

    def flow(params: optax.Params) -> jax.Array:
        outputs = apply_fn(params, ones)
        return sum((jnp.sum(x, dtype=wide_dtype(x.dtype)) for x in jax.tree.leaves(outputs)), jnp.zeros(()))

    def score(params: optax.Params) -> Any:
        positive = jax.tree.map(jnp.abs, params)
        return jax.tree.map(lambda w, g: jnp.abs(wide_product(w, g)), positive, jax.grad(flow)(positive))

    return score
