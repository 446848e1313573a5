"""Scores from all steps so far: where weights have moved, and how much the loss has depended on them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from agent_optax._tree import wide_dtype
from agent_optax._validation import check_fraction
from agent_optax.sparsity._layer import Layer
from agent_optax.sparsity._running_score import RunningScore


def movement() -> Movement:
    r"""Movement: weights that have moved away from zero are kept, whatever their size.

    .. math::
        S \leftarrow S - w\, g

    in every step, with the weight and the gradient before it: under gradient descent S grows while :math:`|w|` does.
    The smallest, which are negative, are pruned. S of an inactive weight is 0, and starts there when it grows again. It
    costs an array like the pruned parameters, in float32 for parameters of fewer bits. Made for fine-tuning a
    pretrained network: ``gradual_pruning(stop=..., score=movement())``.

    The paper trains the scores, with masks in the forward pass and gradients straight through them; there the weights
    of all positions move, here those of active ones, as under any topology.

    Returns:
        A score for `gradual_pruning`, or for ``drop=`` of `drop_and_grow`.

    Example:
        >>> import agent_optax, optax
        >>> topology = agent_optax.gradual_pruning(stop=800, score=agent_optax.movement())
        >>> tx = agent_optax.sparsify(optax.adamw(1e-5), topology, sparsity=0.85)

    References:
        Sanh, Wolf and Rush, Movement Pruning: Adaptive Sparsity by Fine-Tuning, NeurIPS 2020.
    """
    return Movement()


@dataclasses.dataclass(frozen=True)
class Movement(RunningScore):
    """See `movement`."""

    def init(self, param: jax.Array) -> jax.Array:
        """Zero."""
        return jnp.zeros_like(param, dtype=wide_dtype(param.dtype))

    def observe(self, statistic: jax.Array, weights: jax.Array, grads: jax.Array) -> jax.Array:
        """S - w g, and 0 where there is no weight."""
        dtype = statistic.dtype
        return jnp.where(weights == 0, 0, statistic - weights.astype(dtype) * grads.astype(dtype))

    def __call__(self, layer: Layer, key: jax.Array) -> jax.Array:
        """S."""
        return _statistic(layer, key)


def fisher(decay: float = 0.999) -> Fisher:
    r"""Fisher: how much the loss changes, to second order, without the weight, at a minimum.

    .. math::
        s = \tfrac12\, w^2 F, \qquad F \leftarrow \beta F + (1 - \beta)\, g^2

    with a running mean of the squared gradients of batches in place of the diagonal of the Fisher matrix: the second
    moment that Adam keeps. F is of dense gradients, also where weights are inactive; that it starts from zero changes
    no rank. It costs an array like the pruned parameters, in float32 for parameters of fewer bits.

    Args:
        decay: :math:`\beta`, in [0, 1). Default 0.999 (Adam).

    Returns:
        A score for `gradual_pruning`, or for ``drop=`` of `drop_and_grow`.

    Raises:
        ValueError: if `decay` is outside [0, 1).

    Example:
        >>> import agent_optax, optax
        >>> topology = agent_optax.gradual_pruning(stop=800, score=agent_optax.fisher())
        >>> tx = agent_optax.sparsify(optax.adamw(1e-4), topology, sparsity=0.9)

    References:
        Theis et al., Faster Gaze Prediction With Dense Networks and Fisher Pruning, 2018; Kingma and Ba, Adam, ICLR
        2015, for the running mean.
    """
    check_fraction("decay", decay, "it is that of a running mean, such as 0.999", below_one=True)
    return Fisher(decay)


@dataclasses.dataclass(frozen=True)
class Fisher(RunningScore):
    """See `fisher`."""

    decay: float

    def init(self, param: jax.Array) -> jax.Array:
        """Zero."""
        return jnp.zeros_like(param, dtype=wide_dtype(param.dtype))

    def observe(self, statistic: jax.Array, weights: jax.Array, grads: jax.Array) -> jax.Array:
        """The running mean of squared gradients."""
        del weights
        return self.decay * statistic + (1 - self.decay) * jnp.square(grads.astype(statistic.dtype))

    def __call__(self, layer: Layer, key: jax.Array) -> jax.Array:
        """Half of w^2 F."""
        mean_square = _statistic(layer, key)
        return 0.5 * jnp.square(layer.weights.astype(mean_square.dtype)) * mean_square


def _statistic(layer: Layer, key: jax.Array) -> jax.Array:
    del key
    if layer.statistic is None:
        raise ValueError(
            "a score that keeps a statistic, such as agent_optax.movement(), works in gradual_pruning(score=) and in "
            "drop_and_grow(drop=); this topology keeps none."
        )
    return layer.statistic
