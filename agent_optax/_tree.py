"""Trees of parameters in which an outer wrapper may have hidden leaves behind `optax.MaskedNode`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax


def is_masked(node: Any) -> bool:
    """Tells a part of a tree that an outer `optax.masked` or `optax.partition` has hidden."""
    return isinstance(node, optax.MaskedNode)


def conform(tree: optax.Params, like: optax.Params) -> optax.Params:
    """Hides from `tree` the parts that are hidden in `like`."""
    return jax.tree.map(lambda node, subtree: node if is_masked(node) else subtree, like, tree, is_leaf=is_masked)


def statistics_dtype(params: optax.Params) -> Any:
    """The dtype of losses, inner products and coefficients: float32, or float64 when a parameter is."""
    return jnp.result_type(jnp.float32, *(leaf.dtype for leaf in jax.tree.leaves(params)))


def check_floating(params: optax.Params, who: str) -> None:
    """Raises TypeError naming the first leaf that is not floating."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{who} works on floating-point parameters, but the leaf {jax.tree_util.keystr(path)} has dtype "
                f"{dtype}. Leave it out with optax.masked or optax.partition."
            )


def keep_finite(new: jax.Array, old: jax.Array) -> jax.Array:
    """Entry by entry `new`, or `old` where `new` is not finite."""
    return jnp.where(jnp.isfinite(new), new, old)


def select_active(tree: optax.Updates, active_masks: optax.Params | None) -> optax.Updates:
    """Sets inactive entries to zero; a MaskedNode in `active_masks` stands for a leaf that is all active."""
    if active_masks is None:
        return tree
    return jax.tree.map(
        lambda mask, x: x if is_masked(mask) else jnp.where(mask, x, 0), active_masks, tree, is_leaf=is_masked
    )


def all_finite(tree: Any) -> jax.Array:
    """Whether every entry of every leaf is finite, as one bool."""
    return jnp.all(jnp.asarray([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)], dtype=bool))
