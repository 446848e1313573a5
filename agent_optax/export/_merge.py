"""Weights and masks made one: dense arrays with exact zeros."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from agent_optax.sparsity._leaf_names import leaf_names
from agent_optax.sparsity._masks import active_masks
from agent_optax.sparsity._matching import matched_leaves
from agent_optax.sparsity._state import find_sparsify


def merge(params: optax.Params, masks: Any) -> optax.Params:
    r"""Dense weights with the masks multiplied in, for software that knows nothing of masks.

    .. math::
        p \leftarrow m \odot p

    Args:
        params: a tree of arrays.
        masks: a tree like `params` of bool arrays, None where nothing is pruned, as `agent_optax.active_masks` returns;
            or the state of an optimizer that holds `agent_optax.sparsify`.

    Returns:
        A tree like `params`, 0.0 wherever a mask is False; a nan or infinite weight that is inactive is 0.0 too.

    Raises:
        ValueError: if `masks` does not fit `params`.

    Example:
        >>> import agent_optax, jax.numpy as jnp
        >>> from agent_optax import export
        >>> params = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "bias": jnp.array([5.0, 6.0])}
        >>> masks = {"kernel": jnp.array([[True, False], [False, True]]), "bias": None}
        >>> export.merge(params, masks)["kernel"].tolist()
        [[1.0, 0.0], [0.0, 4.0]]
    """
    leaves, treedef = jax.tree.flatten(params)
    merged = [
        leaf if mask is None else jnp.where(mask, leaf, jnp.zeros_like(leaf))
        for leaf, mask in zip(leaves, mask_of_each_leaf(params, masks), strict=True)
    ]
    return treedef.unflatten(merged)


def mask_of_each_leaf(params: optax.Params, masks: Any) -> list[Any]:
    """The masks in the order of the leaves of `params`, None where nothing is pruned; from a tree or a state."""
    found = matched_masks(params, masks)
    for name, leaf, mask in zip(leaf_names(params), jax.tree.leaves(params), found, strict=True):
        if mask is not None:
            check_mask(name, leaf, mask)
    return found


def matched_masks(params: optax.Params, masks: Any) -> list[Any]:
    """The same, of whatever shape."""
    return matched_leaves(active_masks(masks, params) if find_sparsify(masks) else masks, params, "masks")


def check_mask(name: str, weights: Any, mask: Any) -> None:
    """Raises ValueError unless a mask is one of these weights."""
    if jnp.shape(mask) != jnp.shape(weights) or jnp.result_type(mask) != jnp.bool_:
        raise ValueError(
            f"masks must be boolean and shaped like params, but for {name} the mask is "
            f"{jnp.result_type(mask)}{list(jnp.shape(mask))} and the weight {list(jnp.shape(weights))}: compare with "
            "mask != 0 to make it boolean."
        )


def check_inactive_are_zero(name: str, weights: Any, mask: Any) -> None:
    """Raises ValueError if an inactive weight would be lost."""
    lost = int(jnp.sum((weights != 0) & ~mask))
    if lost:
        raise ValueError(
            f"{lost} inactive weights of {name} are not zero, so the masks do not belong to these weights: pass the "
            "parameters and the state of the same step, or set them to zero first with export.merge(params, masks)."
        )
