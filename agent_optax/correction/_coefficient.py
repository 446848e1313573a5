"""What a coefficient is: how much of the old gradient to use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from agent_optax._estimate import Estimate
from agent_optax.correction._memory import Recalled


class CoefficientState:
    """Base class of the state of a coefficient, which is a NamedTuple too, with a field `correlation`.

    ``class MyState(MyFields, CoefficientState)``, where ``MyFields`` is the NamedTuple. Every method has a default.
    """

    __slots__ = ()

    correlation: jax.Array  # float []: the coefficient c before scaling

    def per_leaf(self, num_leaves: int) -> list[jax.Array]:
        """The coefficient of each leaf of the gradient: the same for all."""
        return [self.correlation] * num_leaves

    def needs_loss_pairs(self) -> bool:
        """Whether `refresh` must evaluate the losses at the old snapshot as well."""
        return False

    def refreshed(self, losses: jax.Array, old_losses: jax.Array | None, is_first: jax.Array) -> Any:
        """The state after a refresh pass over batches with these losses [N], at the new and at the old snapshot."""
        del losses, old_losses, is_first
        return self

    def variance_ratio(self, scaling: jax.Array) -> Estimate:
        """The estimate of Var(corrected) / Var(raw) at this scaling; unknown (1) where nothing is measured."""
        return Estimate(jnp.ones_like(scaling), jnp.zeros_like(scaling, dtype=bool))


class Coefficient(Protocol):
    """How much of the old gradient to use: `constant()`, `loss_regression()`, `gradient_regression()`, ..."""

    def init(self, params: optax.Params) -> Any:
        """Returns the state for these parameters, a `CoefficientState`."""
        ...

    def prepare(self, coefficient_state: Any) -> Any:
        """Returns the state for this step, with current hyperparameters and schedules applied."""
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
    """The bounds of a coefficient: [0, 1] as in the paper, or none."""
    low, high = (0.0, 1.0) if clip else (-jnp.inf, jnp.inf)
    return jnp.asarray(low, dtype), jnp.asarray(high, dtype)
