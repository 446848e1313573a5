"""The product with a sparse matrix whose zeros are never touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from agent_optax.layers._connections import Connections
from agent_optax.layers._row_major import row_major


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
    y = _product(values, x.reshape(-1, connections.inputs), connections)
    return y.reshape(*x.shape[:-1], connections.outputs)


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


@jax.custom_vjp
def _product(values: jax.Array, x: jax.Array, connections: Connections) -> jax.Array:
    """x W, [batch, inputs] -> [batch, outputs]."""
    values_ = _accumulable(values)
    return _in_blocks(lambda x: connections.product(values_, x), connections.num_columns, x)


@jax.custom_vjp
def _transposed_product(values: jax.Array, dy: jax.Array, connections: Connections) -> jax.Array:
    """dy W^T, [batch, outputs] -> [batch, inputs]."""
    values_ = _accumulable(values)
    return _in_blocks(lambda dy: connections.transposed_product(values_, dy), connections.num_columns, dy)


@jax.custom_vjp
def _weight_gradient(x: jax.Array, dy: jax.Array, connections: Connections) -> jax.Array:
    """The entries of x^T dy that exist, [batch, inputs], [batch, outputs] -> the shape of the weights."""
    x_blocks, dy_blocks = _blocks(x, connections.num_columns), _blocks(dy, connections.num_columns)
    gradient = _weight_gradient_of_block(connections, x_blocks[0], dy_blocks[0])
    if len(x_blocks) > 1:

        def add(total: jax.Array, block: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            return total + _weight_gradient_of_block(connections, *block), None

        gradient, _ = jax.lax.scan(add, gradient, (x_blocks[1:], dy_blocks[1:]))
    return gradient.astype(x.dtype)


# Each map is linear in its first two arguments, and its derivatives are the other two maps.
_product.defvjp(
    lambda w, x, c: (_product(w, x, c), (w, x, c)),
    lambda res, dy: (_weight_gradient(res[1], dy, res[2]), _transposed_product(res[0], dy, res[2]), None),
)
_transposed_product.defvjp(
    lambda w, dy, c: (_transposed_product(w, dy, c), (w, dy, c)),
    lambda res, dx: (_weight_gradient(dx, res[1], res[2]), _product(res[0], dx, res[2]), None),
)
_weight_gradient.defvjp(
    lambda x, dy, c: (_weight_gradient(x, dy, c), (x, dy, c)),
    lambda res, dw: (_transposed_product(dw, res[1], res[2]), _product(dw, res[0], res[2]), None),
)


def _weight_gradient_of_block(connections: Connections, x: jax.Array, dy: jax.Array) -> jax.Array:
    return connections.weight_gradient(_features_first(x), _features_first(dy))


def _in_blocks(function: Callable[[jax.Array], jax.Array], num_columns: int, x: jax.Array) -> jax.Array:
    """`function` of features [n, columns] on a batch [batch, n], as many columns at a time."""

    def of_block(block: jax.Array) -> jax.Array:
        return row_major(function(_features_first(block))).astype(x.dtype).T

    blocks = _blocks(x, num_columns)
    y = of_block(blocks[0]) if len(blocks) == 1 else jax.lax.map(of_block, blocks)
    return y.reshape(-1, y.shape[-1])[: len(x)]


def _blocks(x: jax.Array, num_columns: int) -> jax.Array:
    """[batch, n] -> [blocks, samples, n], at least one and at most `num_columns` samples each; missing ones are zero."""
    num_blocks = max(1, -(-len(x) // num_columns))
    num_samples = max(1, -(-len(x) // num_blocks))
    missing = num_blocks * num_samples - len(x)
    x = jnp.pad(x, ((0, missing), (0, 0))) if missing else x
    return x.reshape(num_blocks, num_samples, x.shape[-1])


def _features_first(block: jax.Array) -> jax.Array:
    return _accumulable(row_major(block.T))


def _accumulable(x: jax.Array) -> jax.Array:
    """In a dtype in which sums keep the precision of their terms."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
