"""Means, variances and covariance of the gradients at two points, in one pass that keeps no gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from agent_optax._tree import wide_dtype
from agent_optax.analysis._batches import (
    check_batches,
    check_like_params,
    checked_masks,
    dot,
    masked_grads,
    zeros_like_widened,
)


class PairedMoments(NamedTuple):
    """Of the gradients of N batches at two points."""

    variance: Any  # like params, float [] a leaf: trace of Cov(g_new)
    old_variance: Any  # like params, float [] a leaf: trace of Cov(g_old)
    covariance: Any  # like params, float [] a leaf: trace of Cov(g_new, g_old)
    losses: jax.Array  # float [N]
    old_losses: jax.Array  # float [N]


def paired_moments(
    loss_fn: Callable[..., Any],
    params: optax.Params,
    old_params: optax.Params,
    batches: Any,
    masks: Any,
    has_aux: bool,
) -> PairedMoments:
    """Welford's recursion for vectors: deviations are taken from the running means, so that nothing large cancels."""
    num_batches = check_batches(batches)
    check_like_params("old_params", old_params, params)
    loss_and_grads = masked_grads(loss_fn, checked_masks(params, masks), has_aux)
    zeros = zeros_like_widened(params)
    scalars = jax.tree.map(lambda z: jnp.zeros((), z.dtype), zeros)

    def add_batch(carry: tuple[Any, ...], indexed: tuple[jax.Array, Any]) -> tuple[tuple[Any, ...], Any]:
        index, batch = indexed
        mean, old_mean, variance, old_variance, covariance = carry
        loss, grads = loss_and_grads(params, batch)
        old_loss, old_grads = loss_and_grads(old_params, batch)
        deviation = jax.tree.map(jnp.subtract, grads, mean)
        old_deviation = jax.tree.map(jnp.subtract, old_grads, old_mean)

        def step(total: jax.Array) -> jax.Array:  # 1/n for the n-th batch
            return 1 / (index + 1).astype(total.dtype)

        def moved(mean: jax.Array, deviation: jax.Array) -> jax.Array:
            return mean + step(mean) * deviation

        def added(total: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
            return total + (1 - step(total)) * dot(a, b)

        carry = (
            jax.tree.map(moved, mean, deviation),
            jax.tree.map(moved, old_mean, old_deviation),
            jax.tree.map(added, variance, deviation, deviation),
            jax.tree.map(added, old_variance, old_deviation, old_deviation),
            jax.tree.map(added, covariance, deviation, old_deviation),
        )
        return carry, (loss, old_loss)

    start = (zeros, zeros, scalars, scalars, scalars)
    (_, _, *sums), (losses, old_losses) = jax.lax.scan(add_batch, start, (jnp.arange(num_batches), batches))
    variance, old_variance, covariance = jax.tree.map(lambda total: total / num_batches, sums)
    loss_dtype = wide_dtype(losses.dtype)
    return PairedMoments(variance, old_variance, covariance, losses.astype(loss_dtype), old_losses.astype(loss_dtype))
