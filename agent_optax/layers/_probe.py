"""The gradient with respect to weights that do not exist."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from agent_optax.layers._connections import Connections


@functools.partial(jax.tree_util.register_dataclass, data_fields=["connections", "kernel", "start"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Probed(Connections):
    r"""Connections, and beside their weights a part of a dense kernel, zero, for some consecutive outputs.

    .. math::
        y_o = \sum_i (W_{io} + P_{io})\, x_i, \qquad P = 0

    The gradient with respect to P is the dense gradient of these outputs, and nothing else of it is ever computed.
    """

    connections: Connections
    kernel: jax.Array  # P: [inputs, outputs of the part]
    start: jax.Array  # int32 []: the first of these outputs

    @property
    def inputs(self) -> int:  # type: ignore[override]
        """As the connections have."""
        return self.connections.inputs

    @property
    def outputs(self) -> int:  # type: ignore[override]
        """As the connections have."""
        return self.connections.outputs

    @property
    def values_shape(self) -> tuple[int, ...]:
        """As the connections have."""
        return self.connections.values_shape

    @property
    def num_weights(self) -> int:
        """As the connections have."""
        return self.connections.num_weights

    def add(self, y: jax.Array, product: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """The output of the sparse layer, and the product with the part of a kernel added to its outputs."""
        part = product(self.kernel.astype(y.dtype)).astype(y.dtype)
        return y + jax.lax.dynamic_update_slice_in_dim(jnp.zeros_like(y), part, self.start, axis=-1)


def split_probe(connections: Connections) -> tuple[Connections, Probed | None]:
    """The connections by which a layer multiplies, and the probe beside them, if there is one."""
    if isinstance(connections, Probed):
        return connections.connections.without_point(), connections
    return connections.without_point(), None
