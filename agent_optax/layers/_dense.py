"""Between weights of connections and dense kernels."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from agent_optax.layers._connections import Connections
from agent_optax.layers._sparse_dot import check_values


def to_dense(values: jax.Array, connections: Connections) -> jax.Array:
    r"""The weights as a dense kernel, zero where there is none.

    Args:
        values: of the shape ``connections.values_shape``: the weights.
        connections: which weights exist.

    Returns:
        [inputs, outputs], in the dtype of `values`. Reshape it to ``(*kernel_size, channels_in, channels_out)`` for a
        convolution.

    Raises:
        TypeError: if `connections` are none.
        ValueError: if `values` do not fit them.

    Example:
        >>> import jax.numpy as jnp
        >>> from agent_optax import layers
        >>> connections = layers.FanIn.from_indices([[0], [2]], inputs=3, outputs=2)
        >>> layers.to_dense(jnp.array([[5.0], [7.0]]), connections)
        Array([[5., 0.],
               [0., 0.],
               [0., 7.]], dtype=float32)
    """
    check_values(values, connections)
    return connections.dense(jnp.asarray(values))


def from_dense(kernel: Any, connections: Connections) -> jax.Array:
    """The weights of a dense kernel that exist; the others are left out.

    Args:
        kernel: [inputs, outputs]. Reshape that of a convolution to [height * width * channels in, channels out].
        connections: which weights exist.

    Returns:
        The weights, of the shape ``connections.values_shape``, in the dtype of `kernel`.

    Raises:
        TypeError: if `connections` are none.
        ValueError: if the shape of `kernel` is another.

    Example:
        >>> import jax.numpy as jnp
        >>> from agent_optax import layers
        >>> connections = layers.FanIn.from_indices([[0], [2]], inputs=3, outputs=2)
        >>> layers.from_dense(jnp.arange(6.0).reshape(3, 2), connections)
        Array([[0.],
               [5.]], dtype=float32)
    """
    if not isinstance(connections, Connections):
        raise TypeError(f"connections must be such as FanIn.random makes, got {type(connections).__name__}.")
    shape = (connections.inputs, connections.outputs)
    if jnp.shape(kernel) != shape:
        raise ValueError(
            f"kernel must have the shape {list(shape)} of the connections, [inputs, outputs], got "
            f"{list(jnp.shape(kernel))}."
        )
    return connections.gather(jnp.asarray(kernel))
