"""The coefficient of least variance, and what the paper's stand-in from losses makes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from agent_optax.analysis._batches import tree_total
from agent_optax.analysis._paired_moments import paired_moments
from agent_optax.analysis._variance_ratio import ratio_at
from agent_optax.correction.coefficients._loss_regression import moments_of


class OptimalCoefficient(NamedTuple):
    """What `optimal_coefficient` measures."""

    optimal: Any  # float []: c* of equation (3); with scope="leaf" like params, float [] a leaf
    loss_estimate: jax.Array  # float []: c^ of equation (4), not clipped; nan where the old losses are all equal
    optimal_variance_ratio: jax.Array  # float []: Var(g^) / Var(g_new) with w = c*; the least there is
    loss_estimate_variance_ratio: jax.Array  # float []: the same with w = c^


def optimal_coefficient(
    loss_fn: Callable[..., Any],
    params: optax.Params,
    old_params: optax.Params,
    batches: Any,
    *,
    masks: Any = None,
    scope: Literal["all", "leaf"] = "all",
    has_aux: bool = False,
) -> OptimalCoefficient:
    r"""The weight that minimises the variance of the corrected gradient, beside its estimate from losses.

    .. math::
        c^* = \frac{\mathrm{Cov}(g_{new}, g_{old})}{\mathrm{Var}(g_{old})} \quad \text{(eq. 3)}, \qquad
        \hat c = \frac{\mathrm{Cov}(\ell(B|\theta), \ell(B|\tilde\theta))}{\mathrm{Var}(\ell(B|\tilde\theta))}
        \quad \text{(eq. 4)}

    Variances and covariances run over the batches; for gradients they are traces, as in `gradient_correlation`. What
    is left of the variance is :math:`1 - 2 w\,\mathrm{Cov}/\mathrm{Var}(g_{new}) + w^2\, \mathrm{Var}(g_{old}) /
    \mathrm{Var}(g_{new})`; see `variance_ratio` for other weights. It keeps no gradient; under `jax.jit` it is one
    program, outside it is compiled at each call.

    Args:
        loss_fn: ``loss_fn(params, batch) -> loss``, or ``-> (loss, aux)`` with ``has_aux=True``.
        params: a tree of floating-point arrays.
        old_params: a tree like `params`, where the old gradient is taken, such as
            ``agent_optax.snapshot_params(opt_state, params)``.
        batches: a tree of arrays [N, ...], the leading axis counting batches of equal size.
        masks: a tree like `params` of bool arrays, None where nothing is pruned, as `agent_optax.active_masks` gives:
            gradients of inactive weights count as zero. Default None: all weights are active.
        scope: "all" (default) for one coefficient, "leaf" for one a leaf.
        has_aux: whether `loss_fn` returns ``(loss, aux)``. Default False.

    Returns:
        An `OptimalCoefficient`. Where the old gradients of a leaf (or of all) are the same in every batch, an inactive
        leaf say, c* is undefined and given as 0.

    Raises:
        ValueError: if `scope` is neither "all" nor "leaf", `batches` has no common leading axis, or `old_params` or
            `masks` does not fit `params`.
        TypeError: if a leaf of `params` is not floating-point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from agent_optax import analysis
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch @ params) ** 2)
        >>> batches = jax.random.normal(jax.random.key(0), (50, 8, 3))
        >>> measured = analysis.optimal_coefficient(loss_fn, jnp.ones(3), 2 * jnp.ones(3), batches)
        >>> print(f"c* = {measured.optimal:.3f}, c^ = {measured.loss_estimate:.3f}")  # g is linear, the loss quadratic
        c* = 0.500, c^ = 0.250
        >>> print(f"left: {measured.loss_estimate_variance_ratio:.3f} of the variance with c^")
        left: 0.250 of the variance with c^

    References:
        Lei et al., Balance is Essence, CPAL 2024, equations (3) and (4).
    """
    if scope not in ("all", "leaf"):
        raise ValueError(f'scope must be "all" or "leaf", got {scope!r}: one coefficient for all leaves, or one each.')
    moments = paired_moments(loss_fn, params, old_params, batches, masks, has_aux)
    variance, old_variance = tree_total(moments.variance), tree_total(moments.old_variance)
    covariance = tree_total(moments.covariance)
    if scope == "all":
        optimal = _slope(covariance, old_variance)
        least = ratio_at(optimal, variance, old_variance, covariance)
    else:
        optimal = jax.tree.map(_slope, moments.covariance, moments.old_variance)
        saved = jax.tree.map(
            lambda c, cov, old: 2 * c * cov - c**2 * old, optimal, moments.covariance, moments.old_variance
        )
        least = 1 - tree_total(saved) / variance
    slope = moments_of(moments.losses, moments.old_losses).slope()
    loss_estimate = jnp.where(slope.is_known, slope.number, jnp.nan)
    return OptimalCoefficient(
        optimal=optimal,
        loss_estimate=loss_estimate,
        optimal_variance_ratio=least,
        loss_estimate_variance_ratio=ratio_at(loss_estimate, variance, old_variance, covariance),
    )


def _slope(covariance: jax.Array, old_variance: jax.Array) -> jax.Array:
    measured = old_variance > 0
    return jnp.where(measured, covariance / jnp.where(measured, old_variance, 1), 0)
