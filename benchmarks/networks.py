"""Parameters of multilayer perceptrons of a given size, with a loss, for timing."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import optax

NUM_INPUTS, NUM_CLASSES = 784, 10


def mlp_params(num_params: int, seed: int = 0, multiple_of: int = 1) -> dict[str, dict[str, jax.Array]]:
    """Hidden layers of equal width, with about `num_params` weights, He initialisation.

    Three of them; one below 100,000 weights, where it matters how fast a smoke test compiles.
    """
    num_hidden = 3 if num_params >= 100_000 else 1
    width = multiple_of
    while NUM_INPUTS * width + (num_hidden - 1) * width * width + width * NUM_CLASSES < num_params:
        width += multiple_of
    sizes = [NUM_INPUTS, *[width] * num_hidden, NUM_CLASSES]
    keys = jax.random.split(jax.random.key(seed), len(sizes) - 1)
    return {
        f"dense_{i}": {
            "kernel": jax.random.normal(keys[i], (m, n)) * jnp.sqrt(2.0 / m),
            "bias": jnp.zeros(n),
        }
        for i, (m, n) in enumerate(itertools.pairwise(sizes))
    }


def batches(num_batches: int, batch_size: int, seed: int = 1) -> tuple[jax.Array, jax.Array]:
    """Stacked random inputs and labels."""
    inputs_key, labels_key = jax.random.split(jax.random.key(seed))
    inputs = jax.random.normal(inputs_key, (num_batches, batch_size, NUM_INPUTS))
    return inputs, jax.random.randint(labels_key, (num_batches, batch_size), 0, NUM_CLASSES)


def logits(params: Any, x: jax.Array) -> jax.Array:
    """Of a batch of inputs."""
    for i in range(len(params)):
        layer = params[f"dense_{i}"]
        x = x @ layer["kernel"] + layer["bias"]
        x = jax.nn.relu(x) if i < len(params) - 1 else x
    return x


def loss_fn(params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Mean cross-entropy."""
    inputs, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, inputs), labels).mean()
