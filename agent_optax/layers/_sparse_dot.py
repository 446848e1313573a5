"""The product with a sparse matrix whose zeros are never touched."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from agent_optax.layers._connections import Connections
from agent_optax.layers._probe import product_with_probe
from agent_optax.layers._products import Columns, sparse_product
from agent_optax.layers._row_major import row_major
from agent_optax.layers._rows import rows_of
from agent_optax.layers._sharding import with_automatic_axes


def sparse_dot(x: jax.Array, values: jax.Array, connections: Connections) -> jax.Array:
    r"""A sparse layer without its bias.

    .. math::
        y = x W, \qquad W_{io} = 0 \text{ unless the connections have } (i, o)

    Forward pass, gradients and memory cost what the weights cost that exist. Both gradients have rules of their own,
    made of the three products of the bilinear map, of which each is the derivative of the others:

    .. math::
        y = x W, \qquad \bar x = \bar y W^\top, \qquad \bar W_{io} = \sum_b x_{bi}\, \bar y_{bo}

    so that reverse mode works to any order, ``jax.grad(lambda x: jnp.vdot(jax.grad(loss)(x), v))`` included. Forward
    mode (`jax.jvp`, `jax.jacfwd`, and so `jax.hessian`) is refused by JAX with a TypeError.

    Products of 16-bit numbers are added up in float32. Large batches are worked on in blocks of columns, which stay in
    the cache. Inside, features come first: between two sparse layers and the elementwise functions that follow them XLA
    keeps that layout, so that a network transposes its inputs and outputs once.

    On a mesh, `x` may be split along its batch axes and the weights of `FanIn` along their outputs; axes that are
    explicit are automatic inside, and the output is split as both are.

    Args:
        x: float [..., inputs].
        values: float, of the shape ``connections.values_shape``: the weights.
        connections: which weights exist.

    Returns:
        y [..., outputs], in the dtype that `x` and `values` promote to.

    Raises:
        TypeError: if `connections` are none, or `x` and `values` are not real floating-point arrays.
        ValueError: if shapes do not fit the connections.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from agent_optax import layers
        >>> connections = layers.FanIn.random(jax.random.key(0), inputs=64, outputs=32, density=0.125, group=16)
        >>> values = jax.random.normal(jax.random.key(1), connections.values_shape)
        >>> x = jax.random.normal(jax.random.key(2), (4, 64))
        >>> y = layers.sparse_dot(x, values, connections)
        >>> bool(jnp.allclose(y, x @ layers.to_dense(values, connections), atol=1e-5))
        True
    """
    x, values = check_operands(x, values, connections)
    if x.ndim == 0 or x.shape[-1] != connections.inputs:
        raise ValueError(
            f"x must have {connections.inputs} inputs on its last axis, as the connections have, got the shape "
            f"{list(x.shape)}."
        )
    return with_automatic_axes(_dot, num_whole=0)(x, values, connections)


def _dot(x: jax.Array, values: jax.Array, connections: Connections) -> jax.Array:
    def product(values: jax.Array, connections: Connections) -> jax.Array:
        y = sparse_product(FEATURES, values.astype(x.dtype), x.reshape(-1, connections.inputs), connections)
        return y.reshape(*x.shape[:-1], connections.outputs)

    return product_with_probe(values, connections, lambda kernel: x @ kernel.astype(x.dtype), product)


def check_operands(x: Any, values: Any, connections: Connections) -> tuple[jax.Array, jax.Array]:
    """Both in their common dtype."""
    check_values(values, connections)
    x, values = jnp.asarray(x), jnp.asarray(values)
    dtype = jnp.result_type(x, values)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"x and values must be real floating-point arrays, got {x.dtype} and {values.dtype}.")
    return x.astype(dtype), values.astype(dtype)


def check_values(values: Any, connections: Any) -> None:
    """Raises unless the weights are those of the connections."""
    if not isinstance(connections, Connections):
        raise TypeError(
            "connections must be such as agent_optax.layers.FanIn.random or AnyMask.from_mask make, got "
            f"{type(connections).__name__}."
        )
    if jnp.shape(values) != connections.values_shape:
        raise ValueError(
            f"values must have the shape {list(connections.values_shape)} of these connections "
            f"({type(connections).__name__}, {connections.inputs} inputs, {connections.outputs} outputs), got "
            f"{list(jnp.shape(values))}: are these the connections of another layer?"
        )


class Features(Columns):
    """[batch, features]: a column is a sample."""

    def features_first(self, x: jax.Array) -> jax.Array:
        """[batch, features] -> [features, batch]."""
        return row_major(x.T)

    def looked_up(self, x: jax.Array, lookups: jax.Array | None) -> jax.Array:
        """[features, batch] -> [*lookups, batch]."""
        return x if lookups is None else rows_of(x, lookups)

    def batch_first(self, y: jax.Array, num_samples: int) -> jax.Array:
        """[features, batch] -> [batch, features]."""
        return row_major(y).T


FEATURES = Features()
