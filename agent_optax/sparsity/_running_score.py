"""Scores that keep a number for each weight from step to step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from agent_optax._tree import all_finite, is_masked
from agent_optax.sparsity._layer import Layer


class RunningScore:
    """Base class of a score with a statistic, which the topology keeps in its state: an array like each pruned leaf.

    A subclass says how the statistic starts and moves, and, when called, how weights are ranked by
    ``layer.statistic``. It is static: a frozen dataclass.
    """

    def init(self, param: jax.Array) -> jax.Array:
        """The statistic before the first step, like the parameter."""
        raise NotImplementedError

    def observe(self, statistic: jax.Array, weights: jax.Array, grads: jax.Array) -> jax.Array:
        """The statistic after a step with these weights and their dense gradient."""
        raise NotImplementedError

    def __call__(self, layer: Layer, key: jax.Array) -> jax.Array:
        """Scores of the shape of the layer: those of least score are dropped."""
        raise NotImplementedError


def start_statistics(score: Any, params: optax.Params, masks: Any) -> Any:
    """A tree like the masks, hidden where nothing is pruned; None unless the score keeps a statistic."""
    if not isinstance(score, RunningScore):
        return None
    return jax.tree.map(lambda m, p: m if is_masked(m) else score.init(p), masks, params, is_leaf=is_masked)


def observed_statistics(score: Any, statistics: Any, grads: optax.Updates, params: optax.Params) -> Any:
    """The statistics after a step; a step whose gradient is not finite is left out."""
    if not isinstance(score, RunningScore):
        return statistics
    usable = all_finite(grads)

    def observe(statistic: Any, p: jax.Array, g: jax.Array) -> Any:
        return statistic if is_masked(statistic) else jnp.where(usable, score.observe(statistic, p, g), statistic)

    return jax.tree.map(observe, statistics, params, grads, is_leaf=is_masked)
