"""Masks that a user passes, checked."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from agent_optax.sparsity._leaf_names import leaf_names
from agent_optax.sparsity._matching import matched_leaves


def given_masks(params: optax.Params, masks: Any) -> Any:
    """Checked copies of given masks in a tree like `params`, with MaskedNode for None."""
    return copied_masks(params, masks)[0]


def copied_masks(params: optax.Params, masks: Any) -> tuple[Any, list[Any]]:
    """`given_masks`, and the masks themselves in their order: inside `jax.jit` those may be known, and copies not."""
    leaves, treedef = jax.tree.flatten(params)
    found = matched_leaves(masks, params, "masks=")
    checked = list[Any]([optax.MaskedNode()] * len(leaves))
    originals = []
    for i, (name, leaf, mask) in enumerate(zip(leaf_names(params), leaves, found, strict=True)):
        if mask is None or jnp.size(leaf) == 0:
            continue
        if jnp.shape(mask) != jnp.shape(leaf) or jnp.result_type(mask) not in (jnp.bool_, jnp.uint8, jnp.int8):
            raise ValueError(
                f"masks= must be boolean and shaped like params, but for {name} the mask is "
                f"{jnp.result_type(mask)}{list(jnp.shape(mask))} and the leaf {list(jnp.shape(leaf))}. "
                "Use None where nothing is pruned."
            )
        originals.append(mask)
        # From zeros_like: sharded as the leaf is.
        checked[i] = jnp.zeros_like(leaf, dtype=bool) | jnp.array(mask, dtype=bool)
    if not originals:
        raise ValueError("masks= holds no mask, only None: give a boolean array for each leaf to prune.")
    return treedef.unflatten(checked), originals
