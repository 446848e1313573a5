"""The constant coefficient."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from agent_optax._tree import statistics_dtype, zero_like
from agent_optax._validation import check_number
from agent_optax.correction._coefficient import CoefficientState
from agent_optax.correction._memory import Recalled


class _ConstantFields(NamedTuple):
    correlation: jax.Array  # float []: c


class ConstantState(_ConstantFields, CoefficientState):
    """State of `constant`."""

    __slots__ = ()


@dataclasses.dataclass(frozen=True)
class Constant:
    """See `constant`."""

    c: float | jax.Array

    def init(self, params: optax.Params) -> ConstantState:
        """Starts at c."""
        dtype = statistics_dtype(params)
        return ConstantState(correlation=zero_like(params, dtype) + jnp.asarray(self.c, dtype))

    def prepare(self, coefficient_state: ConstantState) -> ConstantState:
        """With the current c, which `optax.inject_hyperparams` may have changed."""
        correlation = coefficient_state.correlation
        return ConstantState(correlation=jnp.zeros_like(correlation) + jnp.asarray(self.c, correlation.dtype))

    def observe(
        self,
        coefficient_state: ConstantState,
        grads: optax.Updates,
        recalled: Recalled,
        extra_args: Mapping[str, Any],
    ) -> ConstantState:
        """Nothing is learned from a step."""
        del grads, recalled, extra_args
        return coefficient_state


def constant(c: float | jax.Array) -> Constant:
    """The same coefficient at every step.

    .. math::
        c_t = c

    With ``scaling=1``, c = 1 is SVRG (snapshot memory), SAGA (table) or STORM (recursion); c = 0.1 is the
    "Fixed c" of the paper's ablation (Table 6).

    Args:
        c: the coefficient, no unit; a number, or an array under `optax.inject_hyperparams`.

    Returns:
        A coefficient for `agent_optax.correct_gradients`.

    Raises:
        ValueError: if `c` is not finite.

    Example:
        >>> import agent_optax
        >>> svrg = agent_optax.correct_gradients(coefficient=agent_optax.constant(1.0), scaling=1.0)

    References:
        Johnson & Zhang, NeurIPS 2013; Lei et al., CPAL 2024, Table 6.
    """
    check_number("c", c, "1.0 gives plain SVRG")
    return Constant(c)
