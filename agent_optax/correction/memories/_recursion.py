"""The recursion memory: the corrected gradient of STORM and of momentum variance reduction."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from agent_optax._tree import keep_finite, zero_like
from agent_optax.correction._memory import MemoryState, Recalled, required_old_grads, required_params
from agent_optax.correction.coefficients._loss_regression import LossRegression, loss_regression
from agent_optax.correction.memories._cached_snapshot import moved


class _RecursionFields(NamedTuple):
    previous_params: optax.Params  # like params: theta_{t-1}
    previous_estimate: optax.Updates  # like params: the corrected gradient of the previous step
    has_estimate: optax.Params  # like params, bool: False for entries that begin anew (the first step, growth)
    has_previous: jax.Array  # bool []: whether a step has been taken


class RecursionState(_RecursionFields, MemoryState):
    """State of `recursion`."""

    __slots__ = ()

    def recall(self, grads: optax.Updates, extra_args: Mapping[str, Any]) -> Recalled:
        """The gradient of this batch one step ago, and the corrected gradient of that step."""
        old_grads = required_old_grads(extra_args, "recursion()", grads)
        return Recalled(
            old_grads=old_grads,
            mean_grads=jax.tree.map(jnp.where, self.has_estimate, self.previous_estimate, old_grads),
            is_known=self.has_previous,
            old_loss=extra_args.get("old_value"),
        )

    def evaluation_point(self) -> optax.Params:
        """The parameters at which `value_and_grads` evaluates the old gradient."""
        return self.previous_params

    def dense_fields(self) -> tuple[str, ...]:
        """The stored point keeps its own mask."""
        return ("previous_params",)

    def point_fields(self) -> tuple[str, ...]:
        """The previous parameters."""
        return ("previous_params",)

    def moves_every_step(self) -> bool:
        """With each step."""
        return True

    def restarted(self, params: optax.Params) -> RecursionState:
        """The next step is the first."""
        return self._replace(
            previous_params=moved(params, self.previous_params), has_previous=jnp.zeros_like(self.has_previous)
        )


@dataclasses.dataclass(frozen=True)
class Recursion:
    """See `recursion`."""

    def init(self, params: optax.Params) -> RecursionState:
        """No step has been taken: the first one is not corrected."""
        return RecursionState(
            previous_params=jax.tree.map(jnp.copy, params),
            previous_estimate=jax.tree.map(jnp.zeros_like, params),
            has_estimate=jax.tree.map(lambda p: jnp.zeros_like(p, dtype=bool), params),
            has_previous=zero_like(params, bool),
        )

    def remember(
        self,
        memory_state: RecursionState,
        recalled: Recalled,
        grads: optax.Updates,
        corrected: optax.Updates,
        params: optax.Params | None,
        extra_args: Mapping[str, Any],
    ) -> RecursionState:
        """Keeps the parameters and the corrected gradient; an entry that is not finite begins anew."""
        del recalled, grads, extra_args

        def keep(new: jax.Array, old: jax.Array) -> jax.Array:
            return keep_finite(new, old).astype(old.dtype)  # an array of its own: params may be donated

        return RecursionState(
            previous_params=jax.tree.map(keep, required_params(params, "recursion()"), memory_state.previous_params),
            previous_estimate=jax.tree.map(keep, corrected, memory_state.previous_estimate),
            has_estimate=jax.tree.map(jnp.isfinite, corrected),
            has_previous=jnp.ones_like(memory_state.has_previous),
        )

    def default_coefficient(self) -> LossRegression:
        """The paper's coefficient."""
        return loss_regression()


def recursion() -> Recursion:
    r"""The memory of STORM, also called momentum variance reduction (MVR): the estimate corrects itself.

    .. math::
        g_{old} = \nabla \ell(B_t | \theta_{t-1}), \qquad g_{mean} = \hat g_{t-1}, \qquad
        \hat g_t = g_{new} - w\, (g_{old} - \hat g_{t-1})

    A step needs a second gradient, at the previous parameters: `update` takes it as the extra argument
    ``old_grads=``, which `agent_optax.value_and_grads` computes. No pass over the data is needed. `update` needs
    `params`. The first step is not corrected, and neither is the first step of a weight that `sparsify` grows. The
    state holds two copies of the parameters and a bool for each.

    With ``constant(1 - a)`` and ``scaling=1`` it is STORM (`agent_optax.storm`); with a regression coefficient it is
    the AGENT+MVR of the paper's Table 5. The estimate is biased: it forgets the error of earlier steps at the rate
    1 - w, so never with w = 1. A regression sees old and new gradients that agree, and puts c near 1: bound w with a
    `scaling` below 1. `gradient_regression` is the worse choice, because it takes the common error of the two
    gradients for agreement: with ``scaling=1`` it locks the estimate to its error.

    Returns:
        A memory for `agent_optax.correct_gradients`.

    Example:
        >>> import agent_optax, jax.numpy as jnp
        >>> tx = agent_optax.correct_gradients(agent_optax.recursion(), agent_optax.constant(0.5), scaling=1.0)
        >>> params = jnp.zeros(1)
        >>> state = tx.init(params)
        >>> estimate, state = tx.update(jnp.asarray([4.0]), state, params, old_grads=jnp.asarray([4.0]))
        >>> estimate, state = tx.update(jnp.asarray([6.0]), state, params, old_grads=jnp.asarray([8.0]))
        >>> float(estimate[0])  # 6 - 0.5 (8 - 4)
        4.0

    References:
        Cutkosky & Orabona, Momentum-Based Variance Reduction in Non-Convex SGD, NeurIPS 2019.
        Lei et al., Balance is Essence, CPAL 2024, Table 5.
    """
    return Recursion()
