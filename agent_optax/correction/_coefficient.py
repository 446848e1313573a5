"""What a coefficient is, and the constant one: how much of the old gradient to use."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from agent_optax._tree import statistics_dtype
from agent_optax._validation import check_number
from agent_optax.correction._memory import Recalled


class CoefficientState(Protocol):
    """The state of a coefficient; a NamedTuple with a field `correlation` and these methods."""

    correlation: jax.Array  # float []: the coefficient c before scaling

    def per_leaf(self, num_leaves: int) -> list[jax.Array]:
        """Returns c for each leaf of the gradient."""
        ...

    def needs_loss_pairs(self) -> bool:
        """Whether `refresh` must evaluate the losses at the old snapshot."""
        ...

    def refreshed(self, losses: jax.Array, old_losses: jax.Array | None, is_first: jax.Array) -> Any:
        """Returns the state after a refresh pass over batches with these losses."""
        ...

    def variance_ratio(self, scaling: jax.Array) -> jax.Array:
        """Returns the estimate of Var(corrected)/Var(raw) at this scaling; nan where nothing is measured."""
        ...


class Coefficient(Protocol):
    """How much of the old gradient to use: `constant()`, `loss_regression()`, `gradient_regression()`, ..."""

    def init(self, params: optax.Params) -> Any:
        """Returns the state for these parameters."""
        ...

    def prepare(self, coefficient_state: Any) -> Any:
        """Returns the state as a step finds it: with what settings and schedules say now."""
        ...

    def observe(
        self,
        coefficient_state: Any,
        grads: optax.Updates,
        recalled: Recalled,
        extra_args: Mapping[str, Any],
    ) -> Any:
        """Returns the state after a step; the step itself used the state from `prepare`."""
        ...


def unit_interval(clip: bool, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """The bounds of a coefficient: [0, 1] as the paper has it, or none."""
    low, high = (0.0, 1.0) if clip else (-jnp.inf, jnp.inf)
    return jnp.asarray(low, dtype), jnp.asarray(high, dtype)


class ConstantState(NamedTuple):
    """State of `constant`."""

    correlation: jax.Array  # float []: c

    def per_leaf(self, num_leaves: int) -> list[jax.Array]:
        """The same for all leaves."""
        return [self.correlation] * num_leaves

    def needs_loss_pairs(self) -> bool:
        """Nothing is estimated."""
        return False

    def refreshed(self, losses: jax.Array, old_losses: jax.Array | None, is_first: jax.Array) -> ConstantState:
        """A refresh changes nothing."""
        del losses, old_losses, is_first
        return self

    def variance_ratio(self, scaling: jax.Array) -> jax.Array:
        """Nothing is measured."""
        return jnp.full_like(scaling, jnp.nan)


@dataclasses.dataclass(frozen=True)
class Constant:
    """See `constant`."""

    c: float | jax.Array

    def init(self, params: optax.Params) -> ConstantState:
        """Starts at c."""
        return ConstantState(correlation=jnp.asarray(self.c, statistics_dtype(params)))

    def prepare(self, coefficient_state: ConstantState) -> ConstantState:
        """The c of now: `optax.inject_hyperparams` may have changed it."""
        return ConstantState(correlation=jnp.asarray(self.c, coefficient_state.correlation.dtype))

    def observe(
        self,
        coefficient_state: ConstantState,
        grads: optax.Updates,
        recalled: Recalled,
        extra_args: Mapping[str, Any],
    ) -> ConstantState:
        """Nothing is learnt from a step."""
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
