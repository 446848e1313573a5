"""What a topology is: when and how the set of active weights changes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from agent_optax._validation import check_fraction, check_positive_int

if TYPE_CHECKING:
    from agent_optax.sparsity._n_m import Groups


class Layer(NamedTuple):
    """A prunable leaf at a topology update; every array has the shape of the leaf, or of its blocks."""

    weights: jax.Array  # after the optimizer step, zero where inactive
    mask: jax.Array  # bool: active
    grads: jax.Array  # the dense gradient by which to grow
    ever_active: jax.Array | None  # bool: active at any time so far
    momentum: jax.Array | None = None  # moving average of the dense gradients, if the topology keeps one
    groups: Groups | None = None  # of which exactly n entries are active, if the pattern has any
    count: int | None = None  # of active entries, where the storage fixes it


class Target(NamedTuple):
    """What a prunable leaf is to end with."""

    num_units: int  # weights, or blocks of them
    density: float  # the share of active ones that was asked for; nan with given masks
    num_active: int | jax.Array  # their exact number


class Topology:
    """Which weights are active: `static()`, `set_()`, `rigl()`, ... A subclass overrides what differs."""

    is_static = False  # whether the set of active weights never changes
    keeps_counts = True  # whether the number of active weights of a layer never changes
    is_layerwise = True  # whether one layer's update needs no other layer
    counts_jointly = False  # whether active weights of different layers are traded for each other
    honours_groups = True  # whether it keeps a fixed number of active weights in groups of them
    honours_blocks = True  # whether it can work on blocks as it does on weights
    has_latent_weights = False  # whether inactive positions keep weights of their own
    initial_sparsity: float | None = None  # of the start masks, where it is not the sparsity aimed at

    @property
    def interval(self) -> int:
        """Steps between topology updates; `sparsify` may spread the layers over them."""
        raise NotImplementedError

    def init(self, params: optax.Params, masks: Any, targets: Sequence[Target]) -> Any:
        """The topology's own state; `targets` in the order of the pruned leaves."""
        del params, masks, targets
        return ()

    def observe(self, state: Any, grads: optax.Updates) -> Any:
        """The state after the dense gradients of a step."""
        del grads
        return state

    def momenta(self, state: Any, num_layers: int) -> list[jax.Array | None]:
        """The moving average of the dense gradients of each layer, if the state keeps one."""
        del state
        return [None] * num_layers

    def is_due(self, step: jax.Array) -> jax.Array:
        """Whether the topology changes at this step, counted from 1."""
        raise NotImplementedError

    def rewire_layer(self, layer: Layer, step: jax.Array, key: jax.Array) -> jax.Array:
        """The new mask of a layer, if the topology is layerwise."""
        raise NotImplementedError

    def rewire(
        self, layers: Sequence[Layer], state: Any, step: jax.Array, key: jax.Array
    ) -> tuple[list[jax.Array], Any]:
        """The new mask of each layer and the new state, if the topology is not layerwise."""
        raise NotImplementedError


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
    """ceil(fraction * active)."""
    return tolerant_ceil(fraction * num_active)


def tolerant_ceil(number: jax.Array) -> jax.Array:
    """ceil(number), int32, where a number that is whole up to rounding counts as whole."""
    nearest = jnp.round(number)
    is_whole = jnp.abs(number - nearest) <= 4 * jnp.finfo(number.dtype).eps * number
    return jnp.where(is_whole, nearest, jnp.ceil(number)).astype(jnp.int32)


def tolerant_floor(number: float) -> int:
    """floor(number), where a number that is whole up to rounding counts as whole."""
    nearest = round(number)
    return nearest if abs(number - nearest) <= 1e-9 * number else math.floor(number)
