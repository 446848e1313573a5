"""Scores of layers made comparable."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from agent_optax._tree import wide_dtype
from agent_optax.sparsity._layer import Layer
from agent_optax.sparsity._running_score import RunningScore
from agent_optax.sparsity.topologies._prune import check_score
from agent_optax.sparsity.topologies._scores import Score


def normalized(score: Score) -> Score:
    r"""A score over its norm in each layer, so that layers of different scale compare: for ``scope="global"``.

    .. math::
        s' = \frac{s}{\sqrt{\sum_{active} s^2}}

    Within a layer no rank changes. Where all scores are zero they stay so.

    Args:
        score: `weight_magnitude`, `taylor`, `movement()`, or any other.

    Returns:
        A score.

    Raises:
        TypeError: if `score` is not callable.

    Example:
        >>> import agent_optax, optax
        >>> score = agent_optax.normalized(agent_optax.weight_magnitude)
        >>> topology = agent_optax.gradual_pruning(stop=800, score=score, scope="global")
        >>> tx = agent_optax.sparsify(optax.sgd(0.1), topology, sparsity=0.9)

    References:
        Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient Inference, ICLR 2017.
    """
    check_score(score)
    return NormalizedRunning(score) if isinstance(score, RunningScore) else Normalized(score)


@dataclasses.dataclass(frozen=True)
class Normalized:
    """See `normalized`."""

    score: Any

    def __call__(self, layer: Layer, key: jax.Array) -> jax.Array:
        """Over the norm of active weights' scores."""
        scores = self.score(layer, key)
        is_floating = jnp.issubdtype(scores.dtype, jnp.floating)
        scores = scores.astype(wide_dtype(scores.dtype) if is_floating else jnp.float32)
        largest = jnp.max(jnp.where(layer.mask, jnp.abs(scores), 0), initial=0)
        scores = scores / jnp.where(largest > 0, largest, 1)  # whose squares do not underflow
        norm = jnp.sqrt(jnp.sum(jnp.where(layer.mask, jnp.square(scores), 0)))
        return scores / jnp.where(norm > 0, norm, 1)


@dataclasses.dataclass(frozen=True)
class NormalizedRunning(Normalized, RunningScore):
    """`Normalized` of a score that keeps a statistic."""

    def init(self, param: jax.Array) -> jax.Array:
        """That of the score."""
        return self.score.init(param)

    def observe(self, statistic: jax.Array, weights: jax.Array, grads: jax.Array) -> jax.Array:
        """That of the score."""
        return self.score.observe(statistic, weights, grads)
