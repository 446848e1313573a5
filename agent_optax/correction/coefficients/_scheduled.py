"""A coefficient by schedule: the linear decay of alpha-SVRG, the decaying momentum parameter of STORM."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from agent_optax._tree import statistics_dtype, zero_like
from agent_optax.correction._coefficient import CoefficientState
from agent_optax.correction._memory import Recalled


class _ScheduledFields(NamedTuple):
    correlation: jax.Array  # float []: c
    schedule_position: jax.Array  # int32 []: refreshes since the first, or steps, before this one


class ScheduledState(_ScheduledFields, CoefficientState):
    """State of `scheduled`."""

    __slots__ = ()

    def refreshed(self, losses: jax.Array, old_losses: jax.Array | None, is_first: jax.Array) -> ScheduledState:
        """One position further; the first refresh is position 0."""
        del losses, old_losses
        return self._replace(schedule_position=jnp.where(is_first, 0, self.schedule_position + 1))


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """See `scheduled`."""

    schedule: optax.Schedule

    def init(self, params: optax.Params) -> ScheduledState:
        """Starts at position 0."""
        dtype = statistics_dtype(params)
        return self.prepare(ScheduledState(zero_like(params, dtype), zero_like(params, jnp.int32)))

    def prepare(self, coefficient_state: ScheduledState) -> ScheduledState:
        """The coefficient at this position."""
        c = self.schedule(coefficient_state.schedule_position)
        correlation = (
            coefficient_state.correlation
        )  # its type: inside shard_map it may vary where the schedule does not
        return coefficient_state._replace(correlation=jnp.zeros_like(correlation) + jnp.asarray(c, correlation.dtype))

    def observe(
        self,
        coefficient_state: ScheduledState,
        grads: optax.Updates,
        recalled: Recalled,
        extra_args: Mapping[str, Any],
    ) -> ScheduledState:
        """A step counts where there is no refresh."""
        del grads, extra_args
        if recalled.updated_by_refresh:
            return coefficient_state
        return coefficient_state._replace(schedule_position=coefficient_state.schedule_position + 1)


def scheduled(schedule: optax.Schedule) -> Scheduled:
    r"""A coefficient that follows a schedule.

    .. math::
        c_t = \mathrm{schedule}(s)

    where the position s counts refreshes, from 0 at the first, for memories that `agent_optax.refresh` moves
    (`snapshot`), so that c is constant between two refreshes; and steps, from 0, for all others. With ``scaling=1``, a
    snapshot and a linear decay from 0.75 to 0 it is alpha-SVRG (`agent_optax.alpha_svrg`).

    Args:
        schedule: an Optax schedule, called with the position, an int32 scalar; it gives c, no unit.

    Returns:
        A coefficient for `agent_optax.correct_gradients`.

    Raises:
        TypeError: if `schedule` is not callable.

    Example:
        >>> import agent_optax, optax
        >>> decay = optax.linear_schedule(0.75, 0.0, transition_steps=99)  # over 100 refreshes
        >>> tx = agent_optax.correct_gradients(coefficient=agent_optax.scheduled(decay), scaling=1.0)

    References:
        Yin et al., A Coefficient Makes SVRG Effective, ICLR 2025 (https://arxiv.org/abs/2311.05589).
    """
    if not callable(schedule):
        raise TypeError(
            f"schedule must be a function of the position, such as optax.linear_schedule(0.75, 0.0, 99), got "
            f"{schedule!r}. For a fixed coefficient take agent_optax.constant({schedule!r})."
        )
    return Scheduled(schedule)
