"""The optimal coefficient, equation (3), measured on the gradients themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from agent_optax._estimate import Estimate, ratio
from agent_optax._tree import statistics_dtype, zero_like
from agent_optax._validation import check_fraction
from agent_optax.correction._coefficient import CoefficientState, unit_interval
from agent_optax.correction._memory import Recalled


class _GradientRegressionFields(NamedTuple):
    correlation: jax.Array  # float []: c over all leaves
    leaf_correlation: jax.Array  # float [S]: the coefficients in use
    gradient_moments: jax.Array  # float [S, 3]: <new, old>, |old|^2, |new|^2 of deviations from g_mean, averaged


class GradientRegressionState(_GradientRegressionFields, CoefficientState):
    """State of `gradient_regression`; S is 1, or the number of leaves with ``scope="leaf"``."""

    __slots__ = ()

    def per_leaf(self, num_leaves: int) -> list[jax.Array]:
        """One for all leaves, or one a leaf."""
        shared = self.leaf_correlation.shape[0] != num_leaves
        return [self.leaf_correlation[0 if shared else i] for i in range(num_leaves)]

    def refreshed(
        self, losses: jax.Array, old_losses: jax.Array | None, is_first: jax.Array
    ) -> GradientRegressionState:
        """Starts again from 1: at the snapshot itself old and new gradients are the same."""
        del losses, old_losses, is_first
        return GradientRegressionState(
            correlation=jnp.ones_like(self.correlation),
            leaf_correlation=jnp.ones_like(self.leaf_correlation),
            gradient_moments=jnp.zeros_like(self.gradient_moments),
        )

    def variance_ratio(self, scaling: jax.Array) -> Estimate:
        """Var(g_new - w g_old) / Var(g_new), around g_mean, from the moving averages."""
        w = scaling * self.leaf_correlation
        covariance, old_variance, variance = self.gradient_moments.T
        removed = jnp.sum(2 * w * covariance - w**2 * old_variance)
        share = ratio(removed, jnp.sum(variance), otherwise=0)
        return Estimate(1 - share.number, share.is_known)


@dataclasses.dataclass(frozen=True)
class GradientRegression:
    """See `gradient_regression`."""

    decay: float
    clip: bool
    scope: str

    def init(self, params: optax.Params) -> GradientRegressionState:
        """Nothing measured: c = 0 until the first refresh, or the first pair of gradients."""
        dtype = statistics_dtype(params)
        size = len(jax.tree.leaves(params)) if self.scope == "leaf" else 1
        zero = zero_like(params, dtype)
        return GradientRegressionState(
            correlation=zero,
            leaf_correlation=jnp.broadcast_to(zero, (size,)),
            gradient_moments=jnp.broadcast_to(zero, (size, 3)),
        )

    def prepare(self, coefficient_state: GradientRegressionState) -> GradientRegressionState:
        """The coefficient comes from the steps before this one."""
        return coefficient_state

    def observe(
        self,
        coefficient_state: GradientRegressionState,
        grads: optax.Updates,
        recalled: Recalled,
        extra_args: Mapping[str, Any],
    ) -> GradientRegressionState:
        """Averages the inner products of this step in, unless one is not finite."""
        del extra_args
        state = coefficient_state
        dtype = state.correlation.dtype

        def inner_products(new: jax.Array, old: jax.Array, mean: jax.Array) -> jax.Array:
            new, old, mean = (x.astype(dtype) for x in (new, old, mean))
            return jnp.stack(
                [jnp.sum((new - mean) * (old - mean)), jnp.sum((old - mean) ** 2), jnp.sum((new - mean) ** 2)]
            )

        products = [
            inner_products(*leaves)
            for leaves in zip(
                *(jax.tree.leaves(t) for t in (grads, recalled.old_grads, recalled.mean_grads)), strict=True
            )
        ]
        products = jnp.stack(products) if products else jnp.zeros((0, 3), dtype)
        if self.scope == "all":
            products = jnp.sum(products, axis=0, keepdims=True)
        usable = recalled.is_known & jnp.all(jnp.isfinite(products))
        averaged = self.decay * state.gradient_moments + (1 - self.decay) * products
        moments = jnp.where(usable, averaged, state.gradient_moments).astype(dtype)
        bounds = unit_interval(self.clip, dtype)

        def slope(moments: jax.Array, old: jax.Array) -> jax.Array:
            estimate = ratio(moments[..., 0], moments[..., 1], otherwise=old)
            return jnp.where(estimate.is_known, jnp.clip(estimate.number, *bounds), old)

        return GradientRegressionState(
            correlation=slope(jnp.sum(moments, axis=0), state.correlation),
            leaf_correlation=slope(moments, state.leaf_correlation),
            gradient_moments=moments,
        )


def gradient_regression(
    decay: float = 0.98, clip: bool = True, scope: Literal["all", "leaf"] = "all"
) -> GradientRegression:
    r"""The variance-minimising coefficient, equation (3) of the paper, from the gradients of the steps themselves.

    .. math::
        c_t = \frac{\overline{\langle g_{new} - g_{mean},\; g_{old} - g_{mean} \rangle}}
                   {\overline{\lVert g_{old} - g_{mean} \rVert^2}}

    where the bars are moving averages over the steps since the last refresh. The paper calls equation (3)
    impractical and regresses losses instead; but both gradients are available at every step, and two inner products
    are enough. A step uses the average of the steps before it, so the corrected gradient stays unbiased. Each refresh
    starts the averages again, from c = 1. Meant for ``scaling=1``. This is the coefficient that we recommend.

    Args:
        decay: of the moving averages, in [0, 1). Default 0.98, about fifty steps; 0.9 to 0.995 do equally well (ours).
        clip: whether c is clipped to [0, 1].
        scope: ``"all"`` for one coefficient for all leaves (default: one a leaf gains nothing measurable), ``"leaf"``
            for one each.

    Returns:
        A coefficient for `agent_optax.correct_gradients`.

    Raises:
        ValueError: if `decay` is outside [0, 1) or `scope` is unknown.

    Example:
        >>> import agent_optax
        >>> tx = agent_optax.correct_gradients(coefficient=agent_optax.gradient_regression(), scaling=1.0)

    References:
        Lei et al., Balance is Essence, CPAL 2024, equation (3).
    """
    check_fraction("decay", decay, "0.98 averages about fifty steps", below_one=True)
    if scope not in ("all", "leaf"):
        raise ValueError(f"scope must be 'all' (one coefficient) or 'leaf' (one a leaf), got {scope!r}.")
    return GradientRegression(decay, clip, scope)
