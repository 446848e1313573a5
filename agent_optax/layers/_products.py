"""The bilinear map of a sparse layer and its derivatives, on a batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from agent_optax.layers._connections import Connections


class Columns:
    """How a batch becomes columns of a matrix, features first, and back; hashable."""

    num_columns = 1  # of the output, for each sample

    def features_first(self, x: jax.Array) -> jax.Array:
        """[batch, ...] -> the same numbers with features first, [..., batch]."""
        raise NotImplementedError

    def looked_up(self, x: jax.Array, lookups: jax.Array | None) -> jax.Array:
        """Features first -> [*lookups, columns of the output]; linear."""
        raise NotImplementedError

    def output_features_first(self, y: jax.Array) -> jax.Array:
        """[batch, ..., outputs] -> [outputs, columns]."""
        return self.features_first(y)

    def batch_first(self, y: jax.Array, num_samples: int) -> jax.Array:
        """[outputs, columns] -> [batch, ..., outputs]."""
        raise NotImplementedError

    def input_batch_first(self, x: jax.Array, num_samples: int) -> jax.Array:
        """Undoes `features_first`."""
        return self.batch_first(x, num_samples)

    def input_shape(self, connections: Connections, num_samples: int) -> tuple[int, ...]:
        """What `features_first` gives."""
        return (connections.inputs, num_samples)


_custom_vjp: Any = functools.partial(jax.custom_vjp, nondiff_argnums=(0,))


@_custom_vjp
def sparse_product(columns: Columns, values: jax.Array, x: jax.Array, connections: Connections) -> jax.Array:
    """The product y = x W, [batch, ..., inputs] -> [batch, ..., outputs]."""

    def of_block(x: jax.Array) -> jax.Array:
        z = columns.looked_up(_summable(columns.features_first(x)), connections.lookups)
        return columns.batch_first(connections.product(_summable(values), z).astype(x.dtype), x.shape[0])

    return _in_blocks(of_block, columns, connections, x)


@_custom_vjp
def transposed_product(columns: Columns, values: jax.Array, dy: jax.Array, connections: Connections) -> jax.Array:
    """The product dx = dy W^T, [batch, ..., outputs] -> [batch, ..., inputs]."""

    def of_block(dy: jax.Array) -> jax.Array:
        dz = connections.transposed_product(_summable(values), _summable(columns.output_features_first(dy)))
        x = jax.ShapeDtypeStruct(columns.input_shape(connections, dy.shape[0]), dz.dtype)
        (dx,) = jax.linear_transpose(lambda x: columns.looked_up(x, connections.lookups), x)(dz)
        return columns.input_batch_first(dx.astype(dy.dtype), dy.shape[0])

    return _in_blocks(of_block, columns, connections, dy)


@_custom_vjp
def weight_gradient(columns: Columns, x: jax.Array, dy: jax.Array, connections: Connections) -> jax.Array:
    """The entries of dW = x^T dy that exist, in the shape of the weights; dy is [batch, ..., outputs]."""

    def of_block(x: jax.Array, dy: jax.Array) -> jax.Array:
        z = columns.looked_up(_summable(columns.features_first(x)), connections.lookups)
        return connections.weight_gradient(z, _summable(columns.output_features_first(dy)))

    def add(total: jax.Array, block: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return total + of_block(*block), None

    x_blocks, dy_blocks = _blocks(columns, connections, x), _blocks(columns, connections, dy)
    dw = of_block(x_blocks[0], dy_blocks[0])
    if len(x_blocks) > 1:
        dw, _ = jax.lax.scan(add, dw, (x_blocks[1:], dy_blocks[1:]))
    return dw.astype(x.dtype)


# Each map is linear in its first two arguments, and its derivatives are the other two maps.


def _saving_arguments(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    return lambda columns, a, b, connections: (function(columns, a, b, connections), (a, b, connections))


def _of_sparse_product(columns: Columns, saved: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    values, x, connections = saved
    return weight_gradient(columns, x, dy, connections), transposed_product(columns, values, dy, connections), None


def _of_transposed_product(columns: Columns, saved: Any, dx: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    values, dy, connections = saved
    return weight_gradient(columns, dx, dy, connections), sparse_product(columns, values, dx, connections), None


def _of_weight_gradient(columns: Columns, saved: Any, dw: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, dy, connections = saved
    return transposed_product(columns, dw, dy, connections), sparse_product(columns, dw, x, connections), None


sparse_product.defvjp(_saving_arguments(sparse_product), _of_sparse_product)
transposed_product.defvjp(_saving_arguments(transposed_product), _of_transposed_product)
weight_gradient.defvjp(_saving_arguments(weight_gradient), _of_weight_gradient)


def _in_blocks(
    of_block: Callable[[jax.Array], jax.Array], columns: Columns, connections: Connections, x: jax.Array
) -> jax.Array:
    """The function of a batch, as many samples at a time as the connections can take."""
    blocks = _blocks(columns, connections, x)
    y = of_block(blocks[0])[None] if len(blocks) == 1 else jax.lax.map(of_block, blocks)
    return y.reshape(-1, *y.shape[2:])[: x.shape[0]]


def _blocks(columns: Columns, connections: Connections, x: jax.Array) -> jax.Array:
    """[batch, ...] -> [blocks, samples, ...], at least one sample each; what is missing to the last is zero.

    A batch whose size `jax.export` leaves open is one block.
    """
    if not isinstance(x.shape[0], int):
        return x[None]
    most = max(1, connections.num_columns // columns.num_columns)
    num_blocks = max(1, -(-len(x) // most))
    num_samples = max(1, -(-len(x) // num_blocks))
    missing = num_blocks * num_samples - len(x)
    x = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) if missing else x
    return x.reshape(num_blocks, num_samples, *x.shape[1:])


def _summable(x: jax.Array) -> jax.Array:
    """In a dtype in which sums keep the precision of their terms."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
