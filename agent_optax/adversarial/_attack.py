"""What an attack is: its call signature, the batch it accepts, the losses it climbs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

LossFn = Callable[[Any, jax.Array, jax.Array], jax.Array]
"""`loss_fn(params, inputs, labels) -> losses [B]`, one loss per sample."""

LogitsFn = Callable[[Any, jax.Array], jax.Array]
"""`logits_fn(params, inputs) -> logits [B, K]`, the model in evaluation mode."""

StopFn = Callable[[jax.Array], jax.Array]
"""`stop_when(inputs) -> bool [B]`, True for samples that need no further step."""


class Attack(Protocol):
    """A function that moves each input, within a small ball, to where the model does worse.

    Every attack of this package can be called this way, and any function that can is an attack to
    `robust_accuracy`.
    """

    def __call__(
        self,
        params: Any,
        inputs: jax.Array,
        labels: jax.Array,
        key: Any = None,
        *,
        stop_when: StopFn | None = None,
    ) -> jax.Array:
        """Returns the attacked inputs.

        Args:
          params: Parameters of the model, a pytree; never changed.
          inputs: Floating-point samples [B, ...].
          labels: Integer classes [B, ...].
          key: A PRNG key or an int, for attacks that start at random.
          stop_when: `stop_when(inputs) -> bool [B]`. A sample stays at the first point, the start
            included, where this is True.

        Returns:
          Attacked inputs [B, ...], shape and dtype of `inputs`.
        """
        ...


class IterativeAttack(Attack, Protocol):
    """An attack that can be told where to begin."""

    def __call__(
        self,
        params: Any,
        inputs: jax.Array,
        labels: jax.Array,
        key: Any = None,
        *,
        start: jax.Array | None = None,
        stop_when: StopFn | None = None,
    ) -> jax.Array:
        """Returns the attacked inputs.

        Args:
          params: As for `Attack`.
          inputs: As for `Attack`.
          labels: As for `Attack`.
          key: As for `Attack`; not needed with a `start`.
          start: Where the iteration begins [B, ...], in place of a random point.
          stop_when: As for `Attack`.

        Returns:
          Attacked inputs [B, ...], shape and dtype of `inputs`.
        """
        ...


def check_inputs(inputs: Any) -> jax.Array:
    """Returns `inputs` as an array; ValueError unless it is a batch of floats."""
    inputs = jnp.asarray(inputs)
    if not jnp.issubdtype(inputs.dtype, jnp.floating):
        raise ValueError(
            f"inputs must be floating point, got dtype {inputs.dtype}: an attack moves them by "
            "fractions; scale integer pixels first, as in `inputs / 255.0`."
        )
    if inputs.ndim == 0:
        raise ValueError("inputs must have a leading batch axis, got a scalar: pass inputs[None].")
    return inputs


def check_labels(labels: Any, batch_size: int) -> jax.Array:
    """Returns `labels` as an array; ValueError unless they are `batch_size` integer classes."""
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels must be integer classes, got dtype {labels.dtype}: turn one-hot labels into "
            "classes with `labels.argmax(-1)`, other numbers with `labels.astype('int32')`."
        )
    if labels.shape[:1] != (batch_size,):
        raise ValueError(
            f"labels must have the batch axis of the inputs, {batch_size}, got shape "
            f"{labels.shape}: pass one label per sample."
        )
    return labels


def check_classes(labels: Any, batch_size: int) -> jax.Array:
    """Returns `labels` as an array; ValueError unless they are integers [batch_size]."""
    labels = check_labels(labels, batch_size)
    if labels.ndim != 1:
        raise ValueError(f"labels must be one class per sample, got shape {labels.shape}: pass shape ({batch_size},).")
    return labels


def check_losses(losses: jax.Array, batch_size: int) -> jax.Array:
    """Returns `losses`; ValueError unless there is one per sample."""
    if jnp.shape(losses) != (batch_size,):
        raise ValueError(
            f"loss_fn must return one loss per sample, shape ({batch_size},), got shape "
            f"{jnp.shape(losses)}: leave out the mean or sum over the batch."
        )
    return losses
