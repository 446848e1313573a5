"""What a correction weight leaves of the variance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from agent_optax._validation import check_number, is_concrete_number
from agent_optax.analysis._batches import tree_total
from agent_optax.analysis._paired_moments import paired_moments


def variance_ratio(
    loss_fn: Callable[..., Any],
    params: optax.Params,
    old_params: optax.Params,
    batches: Any,
    weight: Any,
    *,
    masks: Any = None,
    has_aux: bool = False,
) -> jax.Array:
    r"""The share of the gradient's variance that is left after correction with given weights.

    .. math::
        \hat g_B = g_B - w\, (g'_B - \bar g'), \qquad
        r(w) = \frac{E\lVert \hat g - E g \rVert^2}{E\lVert g - E g \rVert^2}
             = 1 - 2 w \frac{\mathrm{Cov}(g_{new}, g_{old})}{\mathrm{Var}(g_{new})}
               + w^2 \frac{\mathrm{Var}(g_{old})}{\mathrm{Var}(g_{new})}

    with expectations over the batches, :math:`g_B` the gradient at `params`, :math:`g'_B` at `old_params`, and the mean
    gradient :math:`\bar g'` taken over the same batches, so that the estimate is unbiased. w = 1 is SVRG,
    :math:`w = \gamma c` AGENT; below 1 a correction helps. Where the mean gradient is another one (an older one, a
    sub-sample's, or that of clean data in adversarial training), use `estimator_error`.

    Args:
        loss_fn: ``loss_fn(params, batch) -> loss``, or ``-> (loss, aux)`` with ``has_aux=True``.
        params: a tree of floating-point arrays.
        old_params: a tree like `params`, where the old gradient is taken, such as
            ``agent_optax.snapshot_params(opt_state, params)``.
        batches: a tree of arrays [N, ...], the leading axis counting batches of equal size.
        weight: w, no unit: a number, or an array of any shape, which costs no more; may be traced.
        masks: a tree like `params` of bool arrays, None where nothing is pruned, as `agent_optax.active_masks` gives:
            gradients of inactive weights count as zero. Default None: all weights are active.
        has_aux: whether `loss_fn` returns ``(loss, aux)``. Default False.

    Returns:
        The ratio, in the shape of `weight`; nan or infinite where the raw gradient has no variance.

    Raises:
        ValueError: if `weight` is a number that is not finite, `batches` has no common leading axis, or `old_params`
            or `masks` does not fit `params`.
        TypeError: if a leaf of `params` is not floating-point, or `weight` is no number or array.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from agent_optax import analysis
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch @ params) ** 2)
        >>> params, batches = jnp.ones(3), jax.random.normal(jax.random.key(0), (50, 8, 3))
        >>> weights = jnp.array([0.0, 0.1, 0.5, 1.0])  # none, AGENT's gamma with c = 1, best, SVRG
        >>> print(analysis.variance_ratio(loss_fn, params, 2 * params, batches, weights).round(2))
        [1.   0.64 0.   1.  ]

    References:
        Johnson & Zhang, NeurIPS 2013; Lei et al., Balance is Essence, CPAL 2024, equation (2).
    """
    if is_concrete_number(weight):
        check_number("weight", weight, "1.0 is SVRG, 0.0 no correction")
    try:
        weight = jnp.asarray(weight)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"weight must be a number or an array of weights, got {weight!r}: pass 1.0 for SVRG, or the field "
            "optimal of optimal_coefficient with scope='all'."
        ) from error
    moments = paired_moments(loss_fn, params, old_params, batches, masks, has_aux)
    return ratio_at(weight, *(tree_total(t) for t in (moments.variance, moments.old_variance, moments.covariance)))


def ratio_at(weight: jax.Array, variance: jax.Array, old_variance: jax.Array, covariance: jax.Array) -> jax.Array:
    """r(w) from the variances and the covariance."""
    return 1 - (2 * weight * covariance - weight**2 * old_variance) / variance
