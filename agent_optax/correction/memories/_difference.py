"""The difference memory: MARS's step from the last gradient to this one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from agent_optax._tree import keep_finite, statistics_dtype, zero_like
from agent_optax.correction._memory import MemoryState, Recalled, passed_loss, required_old_grads, required_params
from agent_optax.correction.coefficients._constant import Constant, constant


class _ExactDifferenceFields(NamedTuple):
    last_params: optax.Params  # like params: theta_{t-1}
    has_last: optax.Params  # like params, bool: False for entries that begin anew (the first step, growth)


class ExactDifferenceState(_ExactDifferenceFields, MemoryState):
    """State of `difference` with ``exact=True``."""

    __slots__ = ()

    def recall(self, grads: optax.Updates, extra_args: Mapping[str, Any]) -> Recalled:
        """The gradient of this batch one step ago."""
        old_grads = required_old_grads(extra_args, "difference(exact=True)", grads)
        return Recalled(
            old_grads=jax.tree.map(jnp.where, self.has_last, old_grads, grads),
            mean_grads=grads,
            is_known=jnp.asarray(True),
            old_loss=extra_args.get("old_value"),
        )

    def evaluation_point(self) -> optax.Params:
        """The parameters at which `value_and_grads` evaluates the old gradient."""
        return self.last_params

    def dense_fields(self) -> tuple[str, ...]:
        """The stored point keeps its own mask."""
        return ("last_params",)

    def point_fields(self) -> tuple[str, ...]:
        """The previous parameters."""
        return ("last_params",)

    def moves_every_step(self) -> bool:
        """With each step."""
        return True


class _DifferenceFields(NamedTuple):
    last_grads: optax.Updates  # like params: the gradient of the last step
    has_last: optax.Params  # like params, bool: False for entries that begin anew (the first step, growth)
    last_loss: jax.Array  # float []: the loss of the last step
    has_last_loss: jax.Array  # bool []: whether `value` was passed then


class DifferenceState(_DifferenceFields, MemoryState):
    """State of `difference` with ``exact=False``."""

    __slots__ = ()

    def recall(self, grads: optax.Updates, extra_args: Mapping[str, Any]) -> Recalled:
        """The gradient of the last step."""
        del extra_args
        return Recalled(
            old_grads=jax.tree.map(jnp.where, self.has_last, self.last_grads, grads),
            mean_grads=grads,
            is_known=jnp.asarray(True),
            old_loss=self.last_loss,
            is_old_loss_known=self.has_last_loss,
        )


@dataclasses.dataclass(frozen=True)
class ExactDifference:
    """See `difference`."""

    def init(self, params: optax.Params) -> ExactDifferenceState:
        """No step has been taken: the first one is not corrected."""
        return ExactDifferenceState(
            last_params=jax.tree.map(jnp.copy, params),
            has_last=jax.tree.map(lambda p: jnp.zeros_like(p, dtype=bool), params),
        )

    def remember(
        self,
        memory_state: ExactDifferenceState,
        recalled: Recalled,
        grads: optax.Updates,
        corrected: optax.Updates,
        params: optax.Params | None,
        extra_args: Mapping[str, Any],
    ) -> ExactDifferenceState:
        """Keeps the parameters; an entry that is not finite stays as it was."""
        del recalled, grads, corrected, extra_args
        params = required_params(params, "difference(exact=True)")
        return ExactDifferenceState(  # arrays of their own: params may be donated
            last_params=jax.tree.map(
                lambda p, old: keep_finite(p, old).astype(old.dtype), params, memory_state.last_params
            ),
            has_last=jax.tree.map(jnp.ones_like, memory_state.has_last),
        )

    def default_coefficient(self) -> Constant:
        """MARS's, for a momentum of 0.95."""
        return constant(19.0)


@dataclasses.dataclass(frozen=True)
class Difference:
    """See `difference`."""

    def init(self, params: optax.Params) -> DifferenceState:
        """No gradient has been seen: the first step is not corrected."""
        return DifferenceState(
            last_grads=jax.tree.map(jnp.zeros_like, params),
            has_last=jax.tree.map(lambda p: jnp.zeros_like(p, dtype=bool), params),
            last_loss=zero_like(params, statistics_dtype(params)),
            has_last_loss=zero_like(params, bool),
        )

    def remember(
        self,
        memory_state: DifferenceState,
        recalled: Recalled,
        grads: optax.Updates,
        corrected: optax.Updates,
        params: optax.Params | None,
        extra_args: Mapping[str, Any],
    ) -> DifferenceState:
        """Keeps the gradient; entries that are not finite are skipped."""
        del recalled, corrected, params
        loss = passed_loss(extra_args, memory_state.last_loss)
        return DifferenceState(
            last_grads=jax.tree.map(
                lambda g, old: keep_finite(g, old).astype(old.dtype), grads, memory_state.last_grads
            ),
            has_last=jax.tree.map(lambda g, old: old | jnp.isfinite(g), grads, memory_state.has_last),
            last_loss=loss.number,
            has_last_loss=loss.is_known,
        )

    def default_coefficient(self) -> Constant:
        """MARS's, for a momentum of 0.95."""
        return constant(19.0)


def difference(exact: bool = False) -> ExactDifference | Difference:
    r"""The memory of MARS: not a mean, but the gradient itself is what the old gradient is compared with.

    .. math::
        g_{mean} = g_{new}, \qquad \hat g = g_{new} + w\, (g_{new} - g_{old}), \qquad
        g_{old} = \nabla \ell(B_t | \theta_{t-1}) \ \text{(exact)} \quad\text{or}\quad g_{t-1} \ \text{(not exact)}

    The estimate is ahead of the gradient; an average of estimates, such as a momentum, catches up with the current
    gradient of the whole data set. With momentum :math:`m_t = \beta m_{t-1} + (1-\beta) \hat g_t` and
    :math:`w = \beta / (1-\beta)` the average is exactly STORM's estimate with a = 1 - beta; MARS takes a part of that,
    through `scaling` (`agent_optax.mars_correction`).

    The first step is not corrected. Only ``constant`` and ``scheduled`` coefficients make sense here: around
    :math:`g_{mean} = g_{new}` there is no new deviation to regress, and `gradient_regression` stays at 0.

    Args:
        exact: whether the old gradient is taken on the current batch, at the previous parameters. It costs a second
            gradient, ``old_grads=`` of `update` as `agent_optax.value_and_grads` computes it, and `update` needs
            `params`. Default False: the gradient of the previous step and its batch, which is stored.

    Returns:
        A memory for `agent_optax.correct_gradients`.

    Example:
        >>> import agent_optax, jax.numpy as jnp
        >>> tx = agent_optax.correct_gradients(agent_optax.difference(), agent_optax.constant(1.0), scaling=0.5)
        >>> state = tx.init(jnp.zeros(1))
        >>> estimate, state = tx.update(jnp.asarray([4.0]), state)
        >>> estimate, state = tx.update(jnp.asarray([6.0]), state)
        >>> float(estimate[0])  # 6 + 0.5 (6 - 4)
        7.0

    References:
        Yuan et al., MARS: Unleashing the Power of Variance Reduction for Training Large Models, ICML 2025
        (https://arxiv.org/abs/2411.10438).
    """
    return ExactDifference() if exact else Difference()
