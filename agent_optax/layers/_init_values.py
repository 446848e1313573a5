"""Weights to start from, whose scale knows how many inputs an output really has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from agent_optax.layers._connections import Connections


def init_values(
    key: jax.Array,
    connections: Connections,
    initializer: Callable[..., Any] | None = None,
    dtype: Any = jnp.float32,
) -> jax.Array:
    r"""Weights drawn by an initializer of dense kernels, as if the layer had k inputs.

    .. math::
        v \sim \mathrm{initializer}\left((k, n_{out})\right), \qquad k = \frac{\text{weights}}{n_{out}}

    so that variance scaling, He's, LeCun's and Glorot's included, divides by the fan-in k that exists and not by the
    number of inputs, by which activations would shrink from layer to layer. Where outputs have different numbers of
    inputs (`AnyMask`), k is their mean, rounded, at least 1.

    Args:
        key: a random key.
        connections: which weights exist.
        initializer: ``initializer(key, shape, dtype)``, as in `jax.nn.initializers`. Default
            ``jax.nn.initializers.lecun_normal()``, as in Flax.
        dtype: of the weights. Default float32.

    Returns:
        The weights, of the shape ``connections.values_shape``.

    Raises:
        TypeError: if `connections` are none.

    Example:
        >>> import jax
        >>> from agent_optax import layers
        >>> connections = layers.FanIn.random(jax.random.key(0), inputs=1000, outputs=400, density=0.01)
        >>> float(layers.init_values(jax.random.key(1), connections).var())  # 1 / 10
        0.1

    References:
        Evci et al., Gradient Flow in Sparse Neural Networks and How Lottery Tickets Win, AAAI 2022.
    """
    if not isinstance(connections, Connections):
        raise TypeError(f"connections must be such as FanIn.random makes, got {type(connections).__name__}.")
    initializer = jax.nn.initializers.lecun_normal() if initializer is None else initializer
    if len(connections.values_shape) == 2:
        return initializer(key, connections.values_shape[::-1], dtype).T
    k = max(1, round(connections.num_weights / connections.outputs))
    num_columns = -(-connections.num_weights // k)
    return initializer(key, (k, num_columns), dtype).T.reshape(-1)[: connections.num_weights]
