"""Where an attack begins: at a random point, drawn from a key."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from agent_optax._tree import wide_dtype
from agent_optax._validation import check_number, is_concrete_number
from agent_optax.adversarial._linf_ball import LinfBall


def as_key(key: Any) -> jax.Array:
    """Returns a PRNG key for a key or an int; ValueError when there is none."""
    if key is None:
        raise ValueError(
            "key must be given, got None: the attack starts at random; call "
            "attack(params, inputs, labels, key) with jax.random.key(seed) or an int."
        )
    if jnp.ndim(key) == 0 and jnp.issubdtype(jnp.result_type(key), jnp.integer):
        return jax.random.key(key)
    return key


def uniform_start(key: jax.Array, inputs: jax.Array, epsilon: Any, ball: LinfBall) -> jax.Array:
    """`inputs` plus noise from U(-epsilon, epsilon), projected onto the ball."""
    working = wide_dtype(inputs.dtype)
    noise = jax.random.uniform(key, inputs.shape, working, -epsilon, epsilon)
    return jnp.clip(inputs + noise, *(corner.astype(working) for corner in ball))


def check_start_scale(start_scale: Any) -> None:
    """Raises ValueError unless `start_scale > 0`."""
    hint = "at the input itself a divergence from the input is flat; the published value is 0.001"
    check_number("start_scale", start_scale, hint)
    if is_concrete_number(start_scale) and start_scale <= 0:
        raise ValueError(f"start_scale must be positive, got {start_scale!r}: {hint}.")


def gaussian_start(key: jax.Array, inputs: jax.Array, start_scale: Any) -> jax.Array:
    """`inputs` plus noise from N(0, start_scale^2), not projected."""
    working = wide_dtype(inputs.dtype)
    return inputs + start_scale * jax.random.normal(key, inputs.shape, working)
