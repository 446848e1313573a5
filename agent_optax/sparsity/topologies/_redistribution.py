"""Weights that move between layers: each regrows according to its share of a statistic."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from agent_optax._tree import zero_like

LARGEST_FILL = 0.99  # of a layer's inactive weights: Dettmers and Zettlemoyer leave a little room
ALMOST_DENSE = 0.2  # sparsity below which a layer that is to grow gives up no more than its inactive share
MAX_ROUNDS = 1000


class RedistributionState(NamedTuple):
    """How far the number of active weights has strayed: caps and whole numbers lose some."""

    baseline_active: jax.Array  # int32 []: active weights at the start
    adjusted_growth: jax.Array  # float []: what to grow on top of what is dropped
    total_deficit: jax.Array  # float []: sum over topology updates of baseline - active
    num_deficits: jax.Array  # int32 []: their number

    def after(self, num_active: jax.Array) -> RedistributionState:
        r""":math:`a \leftarrow a / 4 + 3 d / 4 + \bar d`, with the deficit d = baseline - active and its mean."""
        deficit = (self.baseline_active - num_active).astype(self.adjusted_growth.dtype)
        total, number = self.total_deficit + deficit, self.num_deficits + 1
        adjusted = 0.25 * self.adjusted_growth + 0.75 * deficit + total / number.astype(total.dtype)
        return RedistributionState(self.baseline_active, adjusted, total, number)


def start_redistribution(num_active: jax.Array, dtype: jnp.dtype) -> RedistributionState:
    """Nothing has strayed."""
    return RedistributionState(num_active, jnp.zeros((), dtype), jnp.zeros((), dtype), jnp.zeros((), jnp.int32))


def shares(means: jax.Array) -> jax.Array:
    """Each layer's share [L] of the sum of the statistics [L]; equal ones when all are zero."""
    total = jnp.sum(means)
    return jnp.where(total > 0, means / jnp.where(total > 0, total, 1), 1 / means.size)


def drop_fractions(fraction: jax.Array, share: jax.Array, sparsity: jax.Array) -> jax.Array:
    """The drop fraction of each layer [L]: an almost dense layer that deserves more weights gives up few."""
    is_cautious = (sparsity < ALMOST_DENSE) & (share > 1 / share.size)
    return jnp.where(is_cautious, jnp.minimum(sparsity, fraction), fraction)


def growth(share: jax.Array, budget: jax.Array, num_inactive: jax.Array) -> jax.Array:
    """How many weights each layer regrows [L]: its share of the budget, the overflow of full layers spread equally.

    A layer takes at most 99% of its inactive weights; what is above that goes to all layers in equal parts, until
    nothing is left over. The result may be fractional.
    """
    cap = LARGEST_FILL * num_inactive.astype(share.dtype)

    def spread(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        round_, regrow, overflow = carry
        regrow = regrow + overflow / share.size
        return round_ + 1, jnp.minimum(regrow, cap), jnp.sum(jnp.maximum(regrow - cap, 0))

    def is_left(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return ((carry[0] == 0) | (carry[2] > 0)) & (carry[0] < MAX_ROUNDS)

    start = (jnp.zeros((), jnp.int32), jnp.round(share * budget), zero_like((budget, cap), share.dtype))
    return jax.lax.while_loop(is_left, spread, start)[1]
