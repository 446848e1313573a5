"""Sparse products on meshes whose axes are explicit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from agent_optax.layers._connections import Connections
from agent_optax.sparsity.selection._tiles import explicit_spec

Product = Callable[[jax.Array, jax.Array, Connections], jax.Array]


def with_automatic_axes(function: Product, num_whole: int) -> Product:
    """The function of x, weights and connections, with the axes of a mesh automatic inside.

    Its output is laid out as the batch axes of `x` are, and along its outputs as those of the weights, if they have an
    axis of outputs; `num_whole` axes between those are whole.
    """

    def call(x: jax.Array, values: jax.Array, connections: Connections) -> jax.Array:
        spec, of_values = explicit_spec(x), explicit_spec(values)
        if spec is None and of_values is None:
            return function(x, values, connections)
        batch = (None,) * (x.ndim - num_whole - 1) if spec is None else spec[: x.ndim - num_whole - 1]
        outputs = of_values[0] if of_values is not None and values.ndim == 2 else None
        if outputs in batch:
            outputs = None
        layout = PartitionSpec(*batch, *(None,) * num_whole, outputs)
        automatic: Any = jax.sharding.auto_axes(function, out_sharding=layout)
        return automatic(x, values, connections)

    return call
