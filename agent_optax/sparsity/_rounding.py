"""Rounding that takes a number for whole where it is so up to rounding errors."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def tolerant_ceil(number: jax.Array) -> jax.Array:
    """ceil(number), int32, where a number that is whole up to rounding counts as whole."""
    nearest = jnp.round(number)
    is_whole = jnp.abs(number - nearest) <= 4 * jnp.finfo(number.dtype).eps * number
    return jnp.where(is_whole, nearest, jnp.ceil(number)).astype(jnp.int32)


def tolerant_floor(number: float) -> int:
    """floor(number), where a number that is whole up to rounding counts as whole."""
    nearest = round(number)
    return nearest if abs(number - nearest) <= 1e-9 * number else math.floor(number)
