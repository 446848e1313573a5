"""The paper's coefficient: a regression of new on old losses, equation (4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from agent_optax._estimate import Estimate, ratio
from agent_optax._tree import statistics_dtype, zero_like
from agent_optax._validation import check_fraction, check_number
from agent_optax.correction._coefficient import CoefficientState, unit_interval
from agent_optax.correction._memory import Recalled, required


class LossMoments(NamedTuple):
    """Moments of pairs (new loss, old loss)."""

    mean_loss: jax.Array  # float []
    mean_old_loss: jax.Array  # float []
    loss_variance: jax.Array  # float []
    old_loss_variance: jax.Array  # float []
    loss_covariance: jax.Array  # float []
    moments_weight: jax.Array  # float []: what moving averages have gathered, 1 - decay^t

    def slope(self) -> Estimate:
        """Cov(new, old) / Var(old)."""
        return ratio(self.loss_covariance, self.old_loss_variance, otherwise=0)


def moments_of(losses: jax.Array, old_losses: jax.Array) -> LossMoments:
    """Moments of the pairs of one pass."""
    mean, old_mean = jnp.mean(losses), jnp.mean(old_losses)
    deviation, old_deviation = losses - mean, old_losses - old_mean
    return LossMoments(
        mean_loss=mean,
        mean_old_loss=old_mean,
        loss_variance=jnp.mean(deviation**2),
        old_loss_variance=jnp.mean(old_deviation**2),
        loss_covariance=jnp.mean(deviation * old_deviation),
        moments_weight=jnp.ones_like(mean),
    )


class _LossRegressionFields(NamedTuple):
    correlation: jax.Array  # float []: the smoothed c; tau in the authors' code
    loss_moments: LossMoments  # of the last refresh pass, or moving averages for memories without one
    loss_smoothing: jax.Array  # float []: alpha
    correlation_bounds: tuple[jax.Array, jax.Array]  # float [], float []: what the estimate is clipped to


class LossRegressionState(_LossRegressionFields, CoefficientState):
    """State of `loss_regression`. Its settings lie here too, because `refresh` sees nothing but the state."""

    __slots__ = ()

    def needs_loss_pairs(self) -> bool:
        """Equation (4) compares the losses at the new and at the old snapshot."""
        return True

    def refreshed(self, losses: jax.Array, old_losses: jax.Array | None, is_first: jax.Array) -> LossRegressionState:
        """Smooths the estimate of this pass in; the first pass has no old snapshot to compare with."""
        dtype = self.correlation.dtype
        moments = moments_of(losses.astype(dtype), jnp.asarray(old_losses, dtype))
        estimate = moments.slope()
        usable = estimate.is_known & ~is_first
        clipped = jnp.clip(estimate.number, *self.correlation_bounds)
        smoothed = (1 - self.loss_smoothing) * self.correlation + self.loss_smoothing * clipped
        return self._replace(
            correlation=jnp.where(usable, smoothed, self.correlation),
            loss_moments=jax.tree.map(lambda new, old: jnp.where(usable, new, old), moments, self.loss_moments),
        )

    def variance_ratio(self, scaling: jax.Array) -> Estimate:
        """Var(l - w l_old) / Var(l): what the correction would do to the losses, a stand-in for the gradients."""
        w, moments = scaling * self.correlation, self.loss_moments
        removed = 2 * w * moments.loss_covariance - w**2 * moments.old_loss_variance
        share = ratio(removed, moments.loss_variance, otherwise=0)
        return Estimate(1 - share.number, share.is_known)


@dataclasses.dataclass(frozen=True)
class LossRegression:
    """See `loss_regression`."""

    smoothing: float
    initial: float
    clip: bool
    decay: float

    def init(self, params: optax.Params) -> LossRegressionState:
        """Starts at `initial`, with nothing measured."""
        dtype = statistics_dtype(params)
        zero = zero_like(params, dtype)
        return LossRegressionState(
            correlation=zero + jnp.asarray(self.initial, dtype),
            loss_moments=LossMoments(*(jnp.copy(zero) for _ in LossMoments._fields)),
            loss_smoothing=jnp.asarray(self.smoothing, dtype),
            correlation_bounds=unit_interval(self.clip, dtype),
        )

    def prepare(self, coefficient_state: LossRegressionState) -> LossRegressionState:
        """With the current smoothing."""
        dtype = coefficient_state.loss_smoothing.dtype
        return coefficient_state._replace(loss_smoothing=jnp.asarray(self.smoothing, dtype))

    def observe(
        self,
        coefficient_state: LossRegressionState,
        grads: optax.Updates,
        recalled: Recalled,
        extra_args: Mapping[str, Any],
    ) -> LossRegressionState:
        """Updates moving averages, for memories that know an old loss at each step."""
        del grads
        state = coefficient_state
        if recalled.updated_by_refresh:
            return state
        dtype = state.correlation.dtype
        loss = jnp.asarray(required(extra_args, "value", "..., coefficient=loss_regression()"), dtype)
        old_loss = recalled.old_loss
        if old_loss is None:
            old_loss = required(extra_args, "old_value", "..., coefficient=loss_regression()")
        old_loss = jnp.asarray(old_loss, dtype)
        moments = state.loss_moments
        weight = self.decay * moments.moments_weight + (1 - self.decay)
        rate = (1 - self.decay) / weight  # debiased: the first pair counts in full
        delta, old_delta = loss - moments.mean_loss, old_loss - moments.mean_old_loss
        new = LossMoments(
            mean_loss=moments.mean_loss + rate * delta,
            mean_old_loss=moments.mean_old_loss + rate * old_delta,
            loss_variance=(1 - rate) * (moments.loss_variance + rate * delta**2),
            old_loss_variance=(1 - rate) * (moments.old_loss_variance + rate * old_delta**2),
            loss_covariance=(1 - rate) * (moments.loss_covariance + rate * delta * old_delta),
            moments_weight=weight,
        )
        usable = recalled.is_known & recalled.is_old_loss_known & jnp.isfinite(loss) & jnp.isfinite(old_loss)
        new = jax.tree.map(lambda n, o: jnp.where(usable, n, o).astype(dtype), new, moments)
        slope = new.slope()
        clipped = jnp.clip(slope.number, *state.correlation_bounds)
        return state._replace(
            correlation=jnp.where(usable & slope.is_known, clipped, state.correlation),
            loss_moments=new,
        )


def loss_regression(
    smoothing: float = 0.3, initial: float = 0.0, clip: bool = True, decay: float = 0.98
) -> LossRegression:
    r"""The coefficient of AGENT: equation (4) of the paper, smoothed over epochs.

    .. math::
        \hat c = \frac{\mathrm{Cov}(\ell(B|\theta_t), \ell(B|\tilde\theta))}{\mathrm{Var}(\ell(B|\tilde\theta))},
        \qquad c \leftarrow (1 - \alpha)\, c + \alpha\, \hat c

    over the batches B of a refresh pass, with :math:`\tilde\theta` still the old snapshot. It needs losses only, no
    gradient. The paper multiplies it by ``scaling`` (gamma) = 0.1. The first refresh has no old snapshot, so c stays
    at `initial` until the second.

    Memories without a refresh pass give one pair (loss, old loss) a step, through the extra arguments ``value=`` and
    ``old_value=``; c is then the regression coefficient of moving averages with `decay`, without further smoothing.

    Args:
        smoothing: :math:`\alpha`, the weight of the new estimate, in [0, 1]. Default 0.3 (the paper).
        initial: c before the first estimate. Default 0 (Algorithm 1).
        clip: whether each estimate is clipped to [0, 1], where the paper puts c. Its published code does not clip:
            ``clip=False`` reproduces that.
        decay: of the moving averages for memories without a refresh pass, in [0, 1). Default 0.98, about fifty
            steps (ours).

    Returns:
        A coefficient for `agent_optax.correct_gradients`.

    Raises:
        ValueError: if `smoothing` or `decay` is out of range, or `initial` is not finite.

    Example:
        >>> import agent_optax
        >>> tx = agent_optax.correct_gradients(coefficient=agent_optax.loss_regression(smoothing=0.3), scaling=0.1)

    References:
        Lei et al., Balance is Essence, CPAL 2024, Algorithm 1 and equation (4).
    """
    check_fraction("smoothing", smoothing, "it is the weight of the newest estimate; the paper takes 0.3")
    check_number("initial", initial, "Algorithm 1 starts at 0")
    check_fraction("decay", decay, "0.98 averages about fifty steps", below_one=True)
    return LossRegression(smoothing, initial, clip, decay)
