"""A point near the parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from agent_optax._tree import select_active, wide_dtype
from agent_optax._validation import check_number, is_concrete_number
from agent_optax.analysis._batches import checked_masks


def perturb(params: optax.Params, scale: float, key: Any, masks: Any = None) -> optax.Params:
    r"""Adds Gaussian noise to each leaf in proportion to the size of its weights.

    .. math::
        \theta' = \theta + s\, \mathrm{rms}(\theta)\, u, \qquad u \sim N(0, I), \qquad
        \mathrm{rms}(\theta)^2 = \tfrac{1}{n} \lVert \theta \rVert^2

    leaf by leaf, with n the number of active weights, so that the expected squared distance is
    :math:`s^2 \lVert\theta\rVert^2`. A leaf that is all zeros, a fresh bias say, stays where it is. This is the second
    point at which the paper compares gradients (C.1).

    Args:
        params: a tree of floating-point arrays.
        scale: s, the relative size of the noise, no unit, at least 0; may be traced.
        key: a PRNG key or an int.
        masks: a tree like `params` of bool arrays, None where nothing is pruned, as `agent_optax.active_masks` gives:
            only active weights move, inactive ones are set to exactly zero. Default None: all weights are active.

    Returns:
        A tree like `params`, in its dtypes.

    Raises:
        ValueError: if `scale` is negative or not finite, or `masks` does not fit `params`.
        TypeError: if a leaf of `params` is not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from agent_optax import analysis
        >>> params = jnp.ones(10_000)
        >>> nearby = analysis.perturb(params, scale=0.1, key=0)
        >>> float(jnp.linalg.norm(nearby - params) / jnp.linalg.norm(params))
        0.1

    References:
        Lei et al., Balance is Essence, CPAL 2024, appendix C.1.
    """
    check_number("scale", scale, "it is the size of the noise relative to that of the weights, such as 0.01")
    if is_concrete_number(scale) and scale < 0:
        raise ValueError(f"scale must not be negative, got {scale!r}: it is a relative size, such as 0.01.")
    active = checked_masks(params, masks)
    key = jax.random.key(key) if isinstance(key, int | np.integer) else key
    params = select_active(params, active)
    counts = [jnp.size(p) for p in jax.tree.leaves(params)]
    if active is not None:
        masks_of_leaves = jax.tree.structure(params).flatten_up_to(active)
        counts = [
            jnp.sum(mask) if isinstance(mask, jax.Array) else count
            for mask, count in zip(masks_of_leaves, counts, strict=True)
        ]

    def moved(index: int, p: jax.Array, count: Any) -> jax.Array:
        wide = jnp.asarray(p, wide_dtype(jnp.result_type(p)))
        rms = jnp.sqrt(jnp.sum(wide**2) / jnp.maximum(count, 1))
        noise = jax.random.normal(jax.random.fold_in(key, index), wide.shape, wide.dtype)
        return (wide + scale * rms * noise).astype(jnp.result_type(p))

    leaves, treedef = jax.tree.flatten(params)
    noisy = [moved(i, p, count) for i, (p, count) in enumerate(zip(leaves, counts, strict=True))]
    return select_active(treedef.unflatten(noisy), active)
