"""What weights are ranked by: those of least score are dropped, positions of largest score are grown."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from agent_optax.sparsity._layer import Layer
from agent_optax.sparsity.selection._top_k import random_scores

Score = Callable[[Layer, jax.Array], jax.Array]  # (layer, key) -> scores of the layer's shape


def weight_magnitude(layer: Layer, key: jax.Array) -> jax.Array:
    r""":math:`|w|`, by which SET, RigL and SNFS drop.

    Args:
        layer: the leaf at a topology update.
        key: not used.

    Returns:
        Scores of the shape of the leaf.

    Example:
        >>> import agent_optax
        >>> topology = agent_optax.drop_and_grow(drop=agent_optax.weight_magnitude, grow=agent_optax.at_random)

    References:
        Mocanu et al., Nature Communications 2018.
    """
    del key
    return jnp.abs(layer.weights)


def taylor(layer: Layer, key: jax.Array) -> jax.Array:
    r""":math:`|w\,g|`: how much, to first order, the loss changes without the weight.

    Args:
        layer: the leaf at a topology update.
        key: not used.

    Returns:
        Scores of the shape of the leaf.

    Example:
        >>> import agent_optax
        >>> topology = agent_optax.drop_and_grow(drop=agent_optax.taylor)

    References:
        Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019.
    """
    del key
    return jnp.abs(layer.weights * layer.grads)


def magnitude_by_sign(layer: Layer, key: jax.Array) -> jax.Array:
    r"""The rank of :math:`|w|` among active weights of the same sign, as SET describes its drop.

    The least positive weight comes first, then the negative one nearest to zero, then the next positive one: half of
    what is dropped is positive and half negative, while there are enough of both. Costs a sort of the layer.

    Args:
        layer: the leaf at a topology update.
        key: not used.

    Returns:
        int32 scores of the shape of the leaf.

    Example:
        >>> import agent_optax
        >>> topology = agent_optax.drop_and_grow(drop=agent_optax.magnitude_by_sign, grow=agent_optax.at_random)

    References:
        Mocanu et al., Nature Communications 2018.
    """
    del key
    weights, mask = layer.weights.reshape(-1), layer.mask.reshape(-1)
    is_negative = weights < 0
    scores = jnp.zeros(weights.shape, jnp.int32)
    for sign in (False, True):
        own = mask & (is_negative == sign)
        order = jnp.argsort(jnp.where(own, jnp.abs(weights), jnp.inf), stable=True)
        rank = jnp.zeros_like(scores).at[order].set(jnp.arange(weights.size, dtype=jnp.int32), unique_indices=True)
        scores = jnp.where(own, 2 * rank + sign, scores)
    return scores.reshape(layer.mask.shape)


def gradient_magnitude(layer: Layer, key: jax.Array) -> jax.Array:
    r""":math:`|g|`, the dense gradient of the step, by which RigL grows.

    Args:
        layer: the leaf at a topology update.
        key: not used.

    Returns:
        Scores of the shape of the leaf.

    Example:
        >>> import agent_optax
        >>> topology = agent_optax.drop_and_grow(drop=agent_optax.taylor, grow=agent_optax.gradient_magnitude)

    References:
        Evci et al., ICML 2020.
    """
    del key
    return jnp.abs(layer.grads)


def momentum_magnitude(layer: Layer, key: jax.Array) -> jax.Array:
    r""":math:`|m|`, the moving average of dense gradients, by which SNFS grows and redistributes.

    Args:
        layer: the leaf at a topology update.
        key: not used.

    Returns:
        Scores of the shape of the leaf.

    Raises:
        ValueError: if the topology keeps no such average.

    Example:
        >>> import agent_optax
        >>> topology = agent_optax.drop_and_grow(grow=agent_optax.momentum_magnitude, momentum=0.9)

    References:
        Dettmers and Zettlemoyer, Sparse Networks from Scratch, 2019.
    """
    del key
    if layer.momentum is None:
        raise ValueError(
            "momentum_magnitude needs a moving average of the dense gradients, and this topology keeps none: use "
            "agent_optax.drop_and_grow(..., momentum=0.9), or agent_optax.snfs()."
        )
    return jnp.abs(layer.momentum)


def at_random(layer: Layer, key: jax.Array) -> jax.Array:
    """A uniform random number for each position, by which SET grows.

    Args:
        layer: the leaf at a topology update.
        key: a JAX random key.

    Returns:
        uint32 scores of the shape of the leaf.

    Example:
        >>> import agent_optax
        >>> topology = agent_optax.drop_and_grow(grow=agent_optax.at_random)

    References:
        Mocanu et al., Nature Communications 2018.
    """
    return random_scores(key, layer.weights)


def never_active(layer: Layer, key: jax.Array) -> jax.Array:
    """Random among the positions that were never active, and only then among the others: explores fastest.

    Args:
        layer: the leaf at a topology update.
        key: a JAX random key.

    Returns:
        uint32 scores of the shape of the leaf.

    Example:
        >>> import agent_optax
        >>> topology = agent_optax.drop_and_grow(grow=agent_optax.never_active)

    References:
        Liu et al., In-Time Over-Parameterization, ICML 2021, for the exploration rate that it raises.
    """
    scores = random_scores(key, layer.weights) >> 1
    return scores if layer.ever_active is None else jnp.where(layer.ever_active, scores, scores | jnp.uint32(1 << 31))
