"""A network as pure functions of its parameters and its BatchNorm statistics."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import models
import numpy as np
from flax import nnx
from loaders import DataSet

from training.config import ModelConfig


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """The structure of a network; parameters and statistics are trees of arrays that are handed in."""

    graphdef: Any
    mean: np.ndarray  # float32 [C], of the training pixels
    deviation: np.ndarray  # float32 [C]

    def training_logits(self, params: Any, batch_stats: Any, images: jax.Array) -> tuple[jax.Array, Any]:
        """Logits [B, K] with the statistics of the batch, and the running statistics that have seen the batch."""
        model = self._model(params, batch_stats)
        logits = model(self._normalised(images), train=True)
        return logits, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    def evaluation_logits(self, params: Any, batch_stats: Any, images: jax.Array) -> jax.Array:
        """Logits [B, K] with the running statistics."""
        return self._model(params, batch_stats)(self._normalised(images), train=False)

    def _normalised(self, images: jax.Array) -> jax.Array:
        """Pixels in [0, 1] standardised here, so that an attack has one range and one radius for all channels."""
        return (images - self.mean) / self.deviation

    def _model(self, params: Any, batch_stats: Any) -> Any:
        params = nnx.State(jax.tree.map(nnx.Param, params))
        return nnx.merge(self.graphdef, params, nnx.State(jax.tree.map(nnx.BatchStat, batch_stats)))


def build_network(config: ModelConfig, data: DataSet, key: jax.Array) -> tuple[Network, Any, Any]:
    """The network, its initial parameters and its initial statistics."""

    def build(key: jax.Array) -> nnx.Module:
        return models.build(
            config.name,
            data.image_shape,
            data.num_classes,
            width=config.width,
            hidden=config.hidden,
            stem=config.stem,
            rngs=nnx.Rngs(key),
        )

    def initial(key: jax.Array) -> tuple[Any, Any]:
        _, params, batch_stats = nnx.split(build(key), nnx.Param, nnx.BatchStat)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats)

    graphdef, *_ = nnx.split(nnx.eval_shape(build, key), nnx.Param, nnx.BatchStat)
    return Network(graphdef, *data.pixel_statistics()), *jax.jit(initial)(key)


def as_pixels(images: jax.Array) -> jax.Array:
    """Bytes as floats in [0, 1]."""
    return images.astype(jnp.float32) / 255
