"""The gradient with respect to weights that do not exist."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from agent_optax.layers._connections import Connections

Product = Callable[[jax.Array], jax.Array]  # dense kernel [inputs, n] -> [..., n]
SparseProduct = Callable[[jax.Array, Connections], jax.Array]  # values, connections -> [..., outputs]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["kernel", "start"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class DensePart:
    """A part P of a dense kernel, zero, for some consecutive outputs: its gradient is the dense gradient of these."""

    kernel: jax.Array  # P: [inputs, outputs of the part]
    start: jax.Array  # int32 []: the first of these outputs

    def product(self, outputs: int, dense_product: Product, sparse_product: SparseProduct) -> jax.Array:
        """[..., outputs]."""
        del sparse_product
        part = dense_product(self.kernel)
        nothing = jnp.zeros((*part.shape[:-1], outputs), part.dtype)
        return jax.lax.dynamic_update_slice_in_dim(nothing, part, self.start, axis=-1)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["connections", "values"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Candidates:
    """Weights P that might exist, zero: no gradient is computed for others."""

    connections: Connections
    values: jax.Array  # P

    def product(self, outputs: int, dense_product: Product, sparse_product: SparseProduct) -> jax.Array:
        """[..., outputs]."""
        del outputs, dense_product
        return sparse_product(self.values, self.connections)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["connections", "probe"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Probed(Connections):
    r"""Connections, and weights beside theirs that are zero.

    .. math::
        y_o = \sum_i (W_{io} + P_{io})\, x_i, \qquad P = 0

    The gradient with respect to P is what growth needs of the dense gradient; nothing else of it is ever computed.
    """

    connections: Connections
    probe: DensePart | Candidates

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


def product_with_probe(
    values: jax.Array, connections: Connections, dense_product: Product, sparse_product: SparseProduct
) -> jax.Array:
    """The product of a layer, [..., outputs], that of its probe added to it where there is one."""
    if not isinstance(connections, Probed):
        return sparse_product(values, connections.without_point())
    y = sparse_product(values, connections.connections.without_point())
    return y + connections.probe.product(connections.outputs, dense_product, sparse_product).astype(y.dtype)


def probed_loss(
    loss_fn: Callable[..., Any], has_aux: bool, params: Any, connections: Any, batch: Any, args: tuple[Any, ...]
) -> Callable[[Mapping[int, DensePart | Candidates]], jax.Array]:
    """The loss as a function of the probes of some layers, by their number."""
    nodes, treedef = jax.tree.flatten(connections, is_leaf=lambda node: isinstance(node, Connections))
    places = [i for i, node in enumerate(nodes) if isinstance(node, Connections)]

    def loss(probes: Mapping[int, DensePart | Candidates]) -> jax.Array:
        probed = list(nodes)
        for layer, probe in probes.items():
            probed[places[layer]] = Probed(probed[places[layer]], probe)
        output = loss_fn(params, batch, treedef.unflatten(probed), *args)
        return output[0] if has_aux else output

    return loss
