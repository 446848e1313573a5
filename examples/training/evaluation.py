"""Loss and accuracy on the test images, in evaluation mode."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from loaders import LabelledImages

from training.network import Network, as_pixels

BATCH_SIZE = 500


@functools.partial(jax.jit, static_argnums=0)
def _sums(
    network: Network, params: Any, variables: Any, images: jax.Array, labels: jax.Array, rows: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The sum of losses and the number of right answers over batches [S, B] of rows; row -1 is none."""

    def of_batch(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = network.evaluation_logits(params, variables, as_pixels(images[rows]))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows])
        is_right = jnp.argmax(logits, axis=-1) == labels[rows]
        return jnp.sum(jnp.where(rows >= 0, losses, 0)), jnp.sum(jnp.where(rows >= 0, is_right, False))

    return jax.tree.map(jnp.sum, jax.lax.map(of_batch, rows))


def evaluate(network: Network, params: Any, variables: Any, data: LabelledImages) -> tuple[float, float]:
    """The mean loss and the accuracy, in percent, over all images.

    Args:
        network: the structure.
        params: its parameters.
        variables: its running statistics.
        data: images on the device, in memory, or decoded on demand, then a batch at a time.
    """
    count = len(data.labels)
    rows = np.full(-(-count // BATCH_SIZE) * BATCH_SIZE, -1, np.int32)
    rows[:count] = np.arange(count)
    rows = rows.reshape(-1, min(BATCH_SIZE, len(rows)))
    loss, num_right = 0.0, 0
    if data.is_in_memory or isinstance(data.images, jax.Array):
        parts = [(data.images, data.labels, rows)]
    else:
        own_rows = np.arange(BATCH_SIZE, dtype=np.int32)
        parts = (
            (data.images[np.maximum(batch, 0)], data.labels[batch], np.where(batch >= 0, own_rows, -1)[None])
            for batch in rows
        )
    for part in parts:
        part_loss, part_right = _sums(network, params, variables, *part)
        loss, num_right = loss + float(part_loss), num_right + int(part_right)
    return loss / count, 100 * num_right / count
