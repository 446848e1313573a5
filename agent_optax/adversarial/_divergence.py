"""How far the answer on attacked inputs is from the answer on clean ones."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from agent_optax._tree import wide_dtype
from agent_optax._validation import check_number, is_concrete_number
from agent_optax.adversarial._attack import check_classes


def kl_divergence(log_probs: jax.Array, adversarial_log_probs: jax.Array) -> jax.Array:
    """`sum_c p_c (log p_c - log q_c)` for each sample, from log p and log q, [B, K] -> [B]."""
    return optax.losses.kl_divergence_with_log_targets(adversarial_log_probs, log_probs)


def widen(logits: jax.Array) -> jax.Array:
    """`logits` in float32 at least: bfloat16 knows no number between 1 and 1.007."""
    return logits.astype(wide_dtype(logits.dtype))


def check_beta(beta: Any) -> None:
    """Raises ValueError unless `beta >= 0`."""
    hint = "pass the weight of the robustness term; the papers use 6.0"
    check_number("beta", beta, hint)
    if is_concrete_number(beta) and beta < 0:
        raise ValueError(f"beta must not be negative, got {beta!r}: {hint}.")


def check_logits(logits: Any, adversarial_logits: Any, labels: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the arguments of a loss as arrays, logits widened; ValueError unless they fit."""
    logits, adversarial_logits = jnp.asarray(logits), jnp.asarray(adversarial_logits)
    for name, array in (("logits", logits), ("adversarial_logits", adversarial_logits)):
        if array.ndim != 2 or not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"{name} must be floats of shape [B, K], got {array.dtype} of shape {array.shape}: "
                "pass the model's output before the softmax."
            )
    if logits.shape != adversarial_logits.shape:
        raise ValueError(
            f"logits and adversarial_logits must have one shape, got {logits.shape} and "
            f"{adversarial_logits.shape}: evaluate the model on the same samples, clean and"
            " attacked."
        )
    return widen(logits), widen(adversarial_logits), check_classes(labels, len(logits))
