"""The history memory: corrects with gradients that are already there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from agent_optax._tree import keep_finite, wide_dtype, zero_like
from agent_optax._validation import check_fraction
from agent_optax.correction._memory import MemoryState, Recalled, passed_loss
from agent_optax.correction.coefficients._gradient_regression import GradientRegression, gradient_regression


class _HistoryFields(NamedTuple):
    previous_grads: optax.Updates  # like params: the gradient of the previous step
    running_mean: optax.Updates  # like params: moving average of past gradients, debiased
    running_weight: jax.Array  # float32 []: the weight that running_mean has gathered, 1 - decay^t
    previous_loss: jax.Array  # float32 []: the loss of the previous step
    has_previous_loss: jax.Array  # bool []: whether `value` was passed then


class HistoryState(_HistoryFields, MemoryState):
    """State of `history`."""

    __slots__ = ()

    def recall(self, grads: optax.Updates, extra_args: Mapping[str, Any]) -> Recalled:
        """The previous gradient, and the mean of those before the current one."""
        del grads, extra_args
        return Recalled(
            old_grads=self.previous_grads,
            mean_grads=self.running_mean,
            is_known=self.running_weight > 0,
            old_loss=self.previous_loss,
            is_old_loss_known=self.has_previous_loss,
        )


@dataclasses.dataclass(frozen=True)
class History:
    """See `history`."""

    decay: float

    def init(self, params: optax.Params) -> HistoryState:
        """No gradient has been seen."""
        return HistoryState(
            previous_grads=jax.tree.map(jnp.zeros_like, params),
            running_mean=jax.tree.map(jnp.zeros_like, params),
            running_weight=zero_like(params, jnp.float32),
            previous_loss=zero_like(params, jnp.float32),
            has_previous_loss=zero_like(params, bool),
        )

    def remember(
        self,
        memory_state: HistoryState,
        recalled: Recalled,
        grads: optax.Updates,
        corrected: optax.Updates,
        params: optax.Params | None,
        extra_args: Mapping[str, Any],
    ) -> HistoryState:
        """Keeps the gradient and its moving average; entries that are not finite are skipped."""
        del recalled, corrected, params
        loss = passed_loss(extra_args, memory_state.previous_loss)
        weight = self.decay * memory_state.running_weight + (1 - self.decay)
        # 1 at the first step: the mean is then that gradient to the last bit, and the difference of the two is 0, not
        # a rounding error whose regression would be noise.
        rate = (1 - self.decay) / weight

        def average(grad: jax.Array, mean: jax.Array) -> jax.Array:
            wide = wide_dtype(mean.dtype)
            grad, old = grad.astype(wide), mean.astype(wide)
            return keep_finite(old + rate.astype(wide) * (grad - old), old).astype(mean.dtype)

        return HistoryState(
            previous_grads=jax.tree.map(
                lambda g, old: keep_finite(g, old).astype(old.dtype), grads, memory_state.previous_grads
            ),
            running_mean=jax.tree.map(average, grads, memory_state.running_mean),
            running_weight=weight.astype(jnp.float32),
            previous_loss=loss.number,
            has_previous_loss=loss.is_known,
        )

    def default_coefficient(self) -> GradientRegression:
        """A coefficient that needs nothing but gradients."""
        return gradient_regression()


def history(decay: float = 0.99) -> History:
    r"""The memory that needs no second gradient: the previous gradient and a running mean of past gradients.

    .. math::
        g_{old} = g_{t-1}, \qquad g_{mean} = m_{t-1}, \quad
        m_t \propto \beta\, m_{t-1} + (1 - \beta)\, g_t

    It makes `correct_gradients` a plain `optax.GradientTransformation`: its state carries the previous gradient and,
    with the default coefficient, the running correlation of successive gradients. Successive minibatch gradients
    correlate weakly, so expect little; it costs nothing but memory.

    Args:
        decay: :math:`\beta` of the running mean, in [0, 1). Default 0.99, about a hundred steps (ours).

    Returns:
        A memory for `agent_optax.correct_gradients`.

    Raises:
        ValueError: if `decay` is outside [0, 1).

    Example:
        >>> import agent_optax, jax.numpy as jnp, optax
        >>> tx = optax.chain(agent_optax.correct_gradients(memory=agent_optax.history()), optax.sgd(0.1))
        >>> params = {"w": jnp.ones(3)}
        >>> state = tx.init(params)
        >>> updates, state = tx.update({"w": jnp.ones(3)}, state, params)
        >>> float(updates["w"][0])
        -0.10000000149011612
    """
    check_fraction("decay", decay, below_one=True, hint="a value such as 0.99 averages about a hundred steps")
    return History(decay)
