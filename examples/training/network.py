"""A network as pure functions of its parameters and of what else it holds."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import models
import numpy as np
from flax import nnx
from loaders import DataSet

import agent_optax
from agent_optax.flax.nnx import SparseConnections, sparse_layers
from agent_optax.layers import Connections
from training.config import ModelConfig, TopologyConfig

KINDS = (nnx.Param, nnx.BatchStat, SparseConnections)


class Variables(NamedTuple):
    """What a network holds beside its parameters."""

    batch_stats: Any  # running means and variances of BatchNorm
    connections: Any  # of sparse layers


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """The structure of a network; parameters and variables are trees of arrays that are handed in.

    Variables are the statistics of BatchNorm, and the connections of sparse layers.
    """

    graphdef: Any
    mean: np.ndarray  # float32 [C], of the training pixels
    deviation: np.ndarray  # float32 [C]

    def training_logits(self, params: Any, variables: Variables, images: jax.Array) -> tuple[jax.Array, Variables]:
        """Logits [B, K] with the statistics of the batch, and the variables after the batch."""
        model = self._model(params, variables)
        logits = model(self._normalised(images), train=True)
        return logits, variables._replace(batch_stats=nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))

    def evaluation_logits(self, params: Any, variables: Variables, images: jax.Array) -> jax.Array:
        """Logits [B, K] with the running statistics."""
        return self._model(params, variables)(self._normalised(images), train=False)

    def _normalised(self, images: jax.Array) -> jax.Array:
        """Pixels in [0, 1] standardised here, so that an attack has one range and one radius for all channels."""
        return (images - self.mean) / self.deviation

    def _model(self, params: Any, variables: Variables) -> Any:
        params = nnx.State(jax.tree.map(nnx.Param, params))
        batch_stats = nnx.State(jax.tree.map(nnx.BatchStat, variables.batch_stats))
        connections = nnx.State(
            jax.tree.map(SparseConnections, variables.connections, is_leaf=lambda node: isinstance(node, Connections))
        )
        return nnx.merge(self.graphdef, params, batch_stats, connections)


def build_network(
    config: ModelConfig, topology: TopologyConfig, data: DataSet, key: jax.Array
) -> tuple[Network, Any, Variables]:
    """The network, its initial parameters and its initial variables."""

    def build(key: jax.Array) -> nnx.Module:
        rngs = nnx.Rngs(key)
        model = models.build(
            config.name,
            data.image_shape,
            data.num_classes,
            width=config.width,
            hidden=config.hidden,
            stem=config.stem,
            rngs=rngs,
        )
        if topology.layers == "sparse":
            sparse_layers(
                model,
                sparsity=topology.sparsity,
                distribution=getattr(agent_optax, topology.distribution),
                group=topology.group or 16,
                kernel_init=nnx.initializers.he_normal(),
                rngs=rngs,
            )
        return model

    def initial(key: jax.Array) -> tuple[Any, Variables]:
        _, *parts = nnx.split(build(key), *KINDS)
        params, batch_stats, connections = map(nnx.to_pure_dict, parts)
        return params, Variables(batch_stats, connections)

    graphdef, *_ = nnx.split(nnx.eval_shape(build, key), *KINDS)
    return Network(graphdef, *data.pixel_statistics()), *jax.jit(initial)(key)


def as_pixels(images: jax.Array) -> jax.Array:
    """Bytes as floats in [0, 1]."""
    return images.astype(jnp.float32) / 255
