"""How much gradients scatter over batches, and how alike they scatter at two points."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from agent_optax.analysis._batches import tree_total
from agent_optax.analysis._paired_moments import paired_moments


class GradientCorrelation(NamedTuple):
    """What `gradient_correlation` measures."""

    correlation: jax.Array  # float []: Cov / sqrt(Var Var), over all leaves; nan where a variance is zero
    variance: jax.Array  # float []: the trace of the covariance matrix of batch gradients at params
    old_variance: jax.Array  # float []: the same at old_params
    covariance: jax.Array  # float []: the trace of the cross-covariance matrix
    leaf_correlation: Any  # like params, float [] a leaf
    leaf_variance: Any  # like params, float [] a leaf
    leaf_old_variance: Any  # like params, float [] a leaf
    leaf_covariance: Any  # like params, float [] a leaf


def gradient_correlation(
    loss_fn: Callable[..., Any],
    params: optax.Params,
    old_params: optax.Params,
    batches: Any,
    *,
    masks: Any = None,
    has_aux: bool = False,
) -> GradientCorrelation:
    r"""Variance of the batch gradients at two points, and their correlation: Figure 1 and Table 9 of the paper.

    .. math::
        \mathrm{Var}(g) = \frac1N \sum_B \lVert g_B - \bar g \rVert^2, \qquad
        \mathrm{Cov}(g_{new}, g_{old}) = \frac1N \sum_B \langle g_B - \bar g,\, g'_B - \bar g' \rangle, \qquad
        \rho = \frac{\mathrm{Cov}(g_{new}, g_{old})}{\sqrt{\mathrm{Var}(g_{new})\, \mathrm{Var}(g_{old})}}

    with :math:`g_B` the gradient of batch B at `params`, :math:`g'_B` at `old_params`: traces of covariance matrices,
    over the N batches as the whole population (times N / (N - 1) they are unbiased for a sample). One pass in
    `jax.lax.scan` with running sums; no more than two gradients and two means are held at a time. Under `jax.jit` it is
    one program; outside it is compiled at each call.

    Args:
        loss_fn: ``loss_fn(params, batch) -> loss``, or ``-> (loss, aux)`` with ``has_aux=True``.
        params: a tree of floating-point arrays.
        old_params: a tree like `params`, the second point: `perturb(params, ...)`, as the paper does, or a snapshot.
        batches: a tree of arrays [N, ...], the leading axis counting batches of equal size.
        masks: a tree like `params` of bool arrays, None where nothing is pruned, as `agent_optax.active_masks` gives:
            gradients of inactive weights count as zero. Default None: all weights are active.
        has_aux: whether `loss_fn` returns ``(loss, aux)``. Default False.

    Returns:
        A `GradientCorrelation`, in total and leaf by leaf, in float32 or wider.

    Raises:
        ValueError: if `batches` has no common leading axis, or `old_params` or `masks` does not fit `params`.
        TypeError: if a leaf of `params` is not floating-point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from agent_optax import analysis
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch @ params) ** 2)
        >>> params, batches = jnp.ones(3), jax.random.normal(jax.random.key(0), (50, 8, 3))
        >>> nearby = analysis.perturb(params, scale=0.1, key=1)
        >>> measured = analysis.gradient_correlation(loss_fn, params, nearby, batches)
        >>> bool(0.9 < measured.correlation < 1)
        True

    References:
        Lei et al., Balance is Essence, CPAL 2024, Figure 1, appendix C.1 and Table 9.
    """
    moments = paired_moments(loss_fn, params, old_params, batches, masks, has_aux)
    variance, old_variance = tree_total(moments.variance), tree_total(moments.old_variance)
    covariance = tree_total(moments.covariance)
    return GradientCorrelation(
        correlation=_correlation(covariance, variance, old_variance),
        variance=variance,
        old_variance=old_variance,
        covariance=covariance,
        leaf_correlation=jax.tree.map(_correlation, moments.covariance, moments.variance, moments.old_variance),
        leaf_variance=moments.variance,
        leaf_old_variance=moments.old_variance,
        leaf_covariance=moments.covariance,
    )


def _correlation(covariance: jax.Array, variance: jax.Array, old_variance: jax.Array) -> jax.Array:
    return covariance / (jnp.sqrt(variance) * jnp.sqrt(old_variance))  # the product itself may underflow
