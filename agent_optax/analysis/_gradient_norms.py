"""How large gradients are at a point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from agent_optax.analysis._batches import (
    check_batches,
    checked_masks,
    dot,
    masked_grads,
    tree_total,
    zeros_like_widened,
)


class GradientNorms(NamedTuple):
    """What `gradient_norms` measures."""

    full_norm: jax.Array  # float []: of the mean gradient over all batches
    batch_norms: jax.Array  # float [N]: of each batch's gradient
    leaf_full_norm: Any  # like params, float [] a leaf
    leaf_batch_norms: Any  # like params, float [N] a leaf


def gradient_norms(
    loss_fn: Callable[..., Any],
    params: optax.Params,
    batches: Any,
    *,
    masks: Any = None,
    has_aux: bool = False,
) -> GradientNorms:
    r"""The norm of the full gradient and of the gradient of each batch: a row of Table 11 of the paper.

    .. math::
        \Big\lVert \frac1N \sum_B g_B \Big\rVert, \qquad \lVert g_B \rVert

    Call it once an epoch, or at the beginning, the middle and the end of training. The mean square of the batch norms
    less the square of the full norm is the variance of `gradient_correlation`. One pass in `jax.lax.scan` that keeps
    one mean gradient; under `jax.jit` it is one program, outside it is compiled at each call.

    Args:
        loss_fn: ``loss_fn(params, batch) -> loss``, or ``-> (loss, aux)`` with ``has_aux=True``.
        params: a tree of floating-point arrays.
        batches: a tree of arrays [N, ...], the leading axis counting batches of equal size.
        masks: a tree like `params` of bool arrays, None where nothing is pruned, as `agent_optax.active_masks` gives:
            gradients of inactive weights count as zero. Default None: all weights are active.
        has_aux: whether `loss_fn` returns ``(loss, aux)``. Default False.

    Returns:
        A `GradientNorms`, in total and leaf by leaf, in float32 or wider.

    Raises:
        ValueError: if `batches` has no common leading axis, or `masks` does not fit `params`.
        TypeError: if a leaf of `params` is not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from agent_optax import analysis
        >>> def loss_fn(params, batch):
        ...     return jnp.vdot(params, batch)  # its gradient is the batch
        >>> norms = analysis.gradient_norms(loss_fn, jnp.zeros(2), jnp.array([[3.0, 4.0], [3.0, -4.0]]))
        >>> print(norms.full_norm, norms.batch_norms)
        3.0 [5. 5.]

    References:
        Lei et al., Balance is Essence, CPAL 2024, Table 11.
    """
    num_batches = check_batches(batches)
    loss_and_grads = masked_grads(loss_fn, checked_masks(params, masks), has_aux)

    def add_batch(total: optax.Updates, batch: Any) -> tuple[optax.Updates, Any]:
        _, grads = loss_and_grads(params, batch)
        return jax.tree.map(jnp.add, total, grads), jax.tree.map(lambda g: dot(g, g), grads)

    total, squares = jax.lax.scan(add_batch, zeros_like_widened(params), batches)
    mean = jax.tree.map(lambda t: t / num_batches, total)
    full_squares = jax.tree.map(lambda g: dot(g, g), mean)
    return GradientNorms(
        full_norm=jnp.sqrt(tree_total(full_squares)),
        batch_norms=jnp.sqrt(tree_total(squares)),
        leaf_full_norm=jax.tree.map(jnp.sqrt, full_squares),
        leaf_batch_norms=jax.tree.map(jnp.sqrt, squares),
    )
