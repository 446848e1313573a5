"""The multilayer perceptron that the suites train."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.sparse

from agent_optax import erk, layers

NUM_CLASSES = 10
MOST_SPARSE = 0.05  # density up to which a sparse product is the faster one
Params = list[dict[str, jax.Array]]
Connections = list[dict[str, layers.FanIn]]  # an empty dictionary for a layer that stays dense


def init_params(key: jax.Array, num_inputs: int, hidden: tuple[int, ...]) -> Params:
    """He initialisation."""
    shapes = list(itertools.pairwise((num_inputs, *hidden, NUM_CLASSES)))
    keys = jax.random.split(key, len(shapes))
    he_normal = jax.nn.initializers.he_normal()
    return [{"kernel": he_normal(k, n), "bias": jnp.zeros(n[1])} for k, n in zip(keys, shapes, strict=True)]


def sparse_start(params: Params, masks: Any) -> Params:
    """Exactly sparse parameters; kernels are scaled up so that a unit's input has the variance it has when dense."""

    def scaled(mask: jax.Array | None, param: jax.Array) -> jax.Array:
        return param if mask is None else jnp.where(mask, param, 0) / jnp.sqrt(jnp.mean(mask))

    return jax.tree.map(scaled, masks, params, is_leaf=lambda x: x is None)


def sparse_layers_start(
    key: jax.Array, num_inputs: int, hidden: tuple[int, ...], sparsity: float, group: int
) -> tuple[Params, Connections]:
    """Sparse layers with ERK's densities and He initialisation of the fan-in that exists."""
    shapes = list(itertools.pairwise((num_inputs, *hidden, NUM_CLASSES)))
    he_normal = jax.nn.initializers.he_normal()
    params, connections = [], []
    keys = jax.random.split(key, len(shapes))
    for own_key, shape, density in zip(keys, shapes, erk(shapes, sparsity), strict=True):
        if density == 1:
            connections.append({})
            weights = {"kernel": he_normal(own_key, shape)}
        else:
            connections_key, values_key = jax.random.split(own_key)
            fan_in = layers.FanIn.random(
                connections_key, inputs=shape[0], outputs=shape[1], density=density, group=group
            )
            connections.append({"connections": fan_in})
            weights = {"values": layers.init_values(values_key, fan_in, he_normal)}
        params.append({**weights, "bias": jnp.zeros(shape[1])})
    return params, connections


def to_dense(params: Params, connections: Connections | None) -> Params:
    """Parameters with a kernel in each layer."""
    if connections is None:
        return params
    return [
        {"kernel": layers.to_dense(layer["values"], own["connections"]), "bias": layer["bias"]} if own else layer
        for layer, own in zip(params, connections, strict=True)
    ]


def logits(params: Params, images: jax.Array, connections: Connections | None = None) -> jax.Array:
    """Logits [B, 10] of images [B, D]."""
    connections = connections or [{}] * len(params)
    for i, (layer, own) in enumerate(zip(params, connections, strict=True)):
        if own:
            images = layers.sparse_dot(images, layer["values"], own["connections"]) + layer["bias"]
        else:
            images = images @ layer["kernel"] + layer["bias"]
        if i < len(params) - 1:
            images = jax.nn.relu(images)
    return images


def loss_fn(params: Params, batch: tuple[jax.Array, jax.Array], connections: Connections | None = None) -> jax.Array:
    """Mean cross-entropy of a batch."""
    images, labels = batch
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits(params, images, connections), labels))


def accuracy(params: Params, images: np.ndarray, labels: np.ndarray) -> float:
    """In percent; on the host, by sparse products where they are cheaper: tests must not cost more than training."""
    activations = np.ascontiguousarray(images.T)
    for i, layer in enumerate(params):
        kernel, bias = np.asarray(layer["kernel"]).T, np.asarray(layer["bias"])[:, None]
        is_sparse = np.count_nonzero(kernel) < MOST_SPARSE * kernel.size
        activations = (scipy.sparse.csr_array(kernel) if is_sparse else kernel) @ activations + bias
        if i < len(params) - 1:
            activations = np.maximum(activations, 0)
    return 100 * float(np.mean(np.argmax(activations, axis=0) == labels))
