"""What a topology is: when and how the set of active weights changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from agent_optax._validation import check_fraction, check_positive_int


class Layer(NamedTuple):
    """A prunable leaf at a topology update; every array has the shape of the leaf."""

    weights: jax.Array  # after the optimizer step, zero where inactive
    mask: jax.Array  # bool: active
    grads: jax.Array  # the dense gradient by which to grow
    ever_active: jax.Array | None  # bool: active at any time so far


class Topology(Protocol):
    """Which weights are active: `static()`, `set_()`, `rigl()`, ..."""

    @property
    def is_static(self) -> bool:
        """Whether the set of active weights never changes."""
        ...

    @property
    def interval(self) -> int:
        """Steps between topology updates; `sparsify` may spread the layers over them."""
        ...

    def is_due(self, step: jax.Array) -> jax.Array:
        """Whether the topology changes at this step, counted from 1."""
        ...

    def rewire(self, layers: Sequence[Layer], step: jax.Array, key: jax.Array) -> list[jax.Array]:
        """Returns the new mask of each layer."""
        ...


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
    fraction = drop_fraction(step) if callable(drop_fraction) else drop_fraction
    return jnp.clip(jnp.asarray(fraction), 0, 1)


def num_dropped(fraction: jax.Array, num_active: jax.Array) -> jax.Array:
    """ceil(fraction * active), where a product that is whole up to rounding counts as whole."""
    product = fraction * num_active
    nearest = jnp.round(product)
    is_whole = jnp.abs(product - nearest) <= 4 * jnp.finfo(product.dtype).eps * product
    return jnp.where(is_whole, nearest, jnp.ceil(product)).astype(jnp.int32)
