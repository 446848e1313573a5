"""When a topology changes, and how much: the common arguments of topologies."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from agent_optax._validation import check_fraction, check_positive_int
from agent_optax.sparsity._rounding import tolerant_ceil


class UpdateTimes(NamedTuple):
    """Steps start, start + every, ... below stop, counted from 1."""

    every: int
    start: int
    stop: int | None

    def include(self, step: jax.Array) -> jax.Array:
        """Whether `step` is one of them."""
        due = (step >= self.start) & ((step - self.start) % self.every == 0)
        return due if self.stop is None else due & (step < self.stop)


def update_times(update_every: int, start: int | None, stop: int | None) -> UpdateTimes:
    """Checks and completes the common arguments of topologies."""
    check_positive_int("update_every", update_every, "it counts optimizer steps between topology updates")
    start = update_every if start is None else start
    check_positive_int("start", start, "steps are counted from 1")
    if stop is not None:
        check_positive_int("stop", stop, "no topology update happens from that step on; None never stops")
        if stop <= start:
            raise ValueError(
                f"stop must lie after start, got start={start}, stop={stop}: no topology update would ever happen. "
                "Use agent_optax.static() for that."
            )
    return UpdateTimes(update_every, start, stop)


def check_drop_fraction(drop_fraction: optax.ScalarOrSchedule) -> None:
    """Raises ValueError for a number outside [0, 1]."""
    if not callable(drop_fraction):
        check_fraction("drop_fraction", drop_fraction, "it is the share of a layer's active weights that is replaced")


def fraction_at(drop_fraction: optax.ScalarOrSchedule, step: jax.Array) -> jax.Array:
    """The drop fraction at this step, within [0, 1]."""
    fraction = jnp.asarray(drop_fraction(step) if callable(drop_fraction) else drop_fraction)
    real = fraction.dtype if jnp.issubdtype(fraction.dtype, jnp.floating) else jnp.float32
    return jnp.clip(fraction.astype(real), 0, 1)


def num_dropped(fraction: jax.Array, num_active: jax.Array) -> jax.Array:
    """ceil(fraction * active)."""
    return tolerant_ceil(fraction * num_active.astype(fraction.dtype))
