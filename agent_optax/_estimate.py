"""A measured number that may not be known yet."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Estimate(NamedTuple):
    """A number, and whether it has been measured: unknown is not nan, so `jax_debug_nans` can stay on."""

    number: jax.Array  # float [...]
    is_known: jax.Array  # bool [...]: where False, `number` is a neutral value


def ratio(numerator: jax.Array, denominator: jax.Array, otherwise: float | jax.Array) -> Estimate:
    """``numerator / denominator`` where both are finite and the denominator is positive, else unknown: `otherwise`."""
    is_known = jnp.isfinite(numerator) & jnp.isfinite(denominator) & (denominator > 0)
    quotient = jnp.where(is_known, numerator, 0) / jnp.where(is_known, denominator, 1)
    return Estimate(jnp.where(is_known, quotient, otherwise), is_known)
