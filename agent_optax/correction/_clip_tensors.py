"""Clipping tensor by tensor, as MARS does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax


def clip_tensors(max_norm: float) -> optax.GradientTransformation:
    """Scales each leaf whose Euclidean norm exceeds `max_norm` down to it."""

    def clip(update: jax.Array) -> jax.Array:
        dtype = jnp.promote_types(update.dtype, jnp.float32)
        norm = jnp.sqrt(jnp.sum(jnp.square(update.astype(dtype))))
        return jnp.where(norm > max_norm, update * (max_norm / norm), update).astype(update.dtype)

    return optax.stateless(lambda updates, params: jax.tree.map(clip, updates))
