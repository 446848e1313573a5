"""Clipping tensor by tensor, as MARS does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from agent_optax._tree import wide_dtype


def clip_tensors(max_norm: float) -> optax.GradientTransformation:
    """Scales each leaf whose Euclidean norm exceeds `max_norm` down to it."""

    def clip(update: jax.Array) -> jax.Array:
        dtype = wide_dtype(update.dtype)
        wide = update.astype(dtype)
        norm = jnp.sqrt(jnp.sum(jnp.square(wide)))
        scale = max_norm / jnp.maximum(norm, max_norm)
        return jnp.where(norm > max_norm, wide * scale, wide).astype(update.dtype)

    return optax.stateless(lambda updates, params: jax.tree.map(clip, updates))
