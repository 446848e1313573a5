"""How much two masks have in common."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from agent_optax._tree import is_absent
from agent_optax.sparsity._matching import matched_leaves
from agent_optax.sparsity._state import large_total


def mask_overlap(a: Any, b: Any) -> jax.Array:
    r"""The share of active weights that two masks have in common: intersection over union, the Jaccard index.

    .. math::
        J = \frac{|a \cap b|}{|a \cup b|}

    over all leaves together; for one leaf pass its masks alone. Masks with the same number n of active weights share
    :math:`|a \cap b| = \frac{2 J}{1 + J}\, n` of them, and differ in :math:`2 \frac{1 - J}{1 + J}\, n` positions, the
    Hamming distance.

    Args:
        a: a tree of bool arrays, None where nothing is pruned, as `active_masks` and `score_masks` return.
        b: a tree like `a`.

    Returns:
        J, float32 []: 1 for equal masks, 0 for disjoint ones; 1 if neither has an active weight.

    Raises:
        ValueError: if the trees do not match, or masks of different shapes are compared.

    Example:
        >>> import agent_optax, jax.numpy as jnp
        >>> a = {"kernel": jnp.array([True, True, False]), "bias": None}
        >>> b = {"kernel": jnp.array([True, False, True]), "bias": None}
        >>> float(agent_optax.mask_overlap(a, b))
        0.333

    References:
        Jaccard, The Distribution of the Flora in the Alpine Zone, New Phytologist 1912.
    """
    others = matched_leaves(b, a, "b")
    leaves = [leaf for leaf in jax.tree.leaves(a, is_leaf=is_absent) if not is_absent(leaf)]
    both, either = [], []
    for mask, other in zip(leaves, others, strict=True):
        shapes = [jnp.shape(mask), None if other is None else jnp.shape(other)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"masks must have equal shapes, got {shapes[0]} in a and {shapes[1] or other} in b.")
        x, y = jnp.asarray(mask, bool), jnp.asarray(other, bool)
        both.append(jnp.sum(x & y, dtype=jnp.int32))
        either.append(jnp.sum(x | y, dtype=jnp.int32))
    union = large_total(either)
    return jnp.where(union > 0, large_total(both) / jnp.where(union > 0, union, 1), 1.0)
