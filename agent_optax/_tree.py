"""Trees of parameters in which an outer wrapper may have hidden leaves behind `optax.MaskedNode`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax


def is_masked(node: Any) -> bool:
    """Tells a part of a tree that an outer `optax.masked` or `optax.partition` has hidden."""
    return isinstance(node, optax.MaskedNode)


def is_absent(node: Any) -> bool:
    """Tells a part of a tree that holds nothing: None, or hidden."""
    return node is None or is_masked(node)


def conform(tree: optax.Params, like: optax.Params) -> optax.Params:
    """Hides from `tree` the parts that are hidden in `like`."""
    return jax.tree.map(lambda node, subtree: node if is_masked(node) else subtree, like, tree, is_leaf=is_masked)


def statistics_dtype(params: optax.Params) -> Any:
    """The dtype of losses, inner products and coefficients: float32, or float64 if a parameter is."""
    is_double = any(jnp.result_type(leaf) == jnp.float64 for leaf in jax.tree.leaves(params))
    return jnp.dtype(jnp.float64 if is_double else jnp.float32)


def wide_dtype(dtype: Any) -> Any:
    """The dtype in which entries of this dtype are summed: itself, or float32 where it has fewer bits."""
    return jnp.dtype(dtype) if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def wide_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """The product in that dtype: in float16 that of small numbers would be zero."""
    return a.astype(wide_dtype(a.dtype)) * b.astype(wide_dtype(b.dtype))


def zero_like(params: optax.Params, dtype: Any) -> jax.Array:
    """A scalar zero for the state of `params`.

    Inside `jax.shard_map` it varies over the mesh axes over which the parameters vary, as what is computed from them
    does: a state must keep its type from step to step.
    """
    distinct = {jax.typeof(leaf): leaf for leaf in jax.tree.leaves(params)}.values()
    zeros = [jnp.zeros_like(leaf, shape=(), dtype=jnp.int32) for leaf in distinct]
    return sum(zeros, jnp.zeros((), jnp.int32)).astype(dtype)


def check_floating(params: optax.Params, who: str) -> None:
    """Raises TypeError naming the first leaf that is not floating-point."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{who} works on floating-point parameters, but the leaf {jax.tree_util.keystr(path)} has dtype "
                f"{dtype}. Leave it out with optax.masked or optax.partition."
            )


def updated(param: jax.Array, update: jax.Array) -> jax.Array:
    """``param + update`` in the dtype of the parameter, rounded once, as `optax.apply_updates` does."""
    if param.dtype == update.dtype:
        return param + update
    wide = wide_dtype(max(param.dtype, update.dtype, key=lambda dtype: jnp.finfo(dtype).bits))
    return (param.astype(wide) + update.astype(wide)).astype(param.dtype)


def keep_finite(new: jax.Array, old: jax.Array) -> jax.Array:
    """Entry by entry `new`, or `old` where `new` is not finite."""
    return jnp.where(jnp.isfinite(new), new, old.astype(new.dtype))


def select_active(tree: optax.Updates, active_masks: optax.Params | None) -> optax.Updates:
    """Sets inactive entries to zero; a MaskedNode in `active_masks` stands for a leaf that is all active."""
    if active_masks is None:
        return tree
    return jax.tree.map(
        lambda mask, x: x if is_masked(mask) else jnp.where(mask, x, jnp.zeros_like(x)),
        active_masks,
        tree,
        is_leaf=is_masked,
    )


def all_finite(tree: Any) -> jax.Array:
    """Whether every entry of every leaf is finite, as one bool."""
    # 0 x is 0, or nan. XLA on a CPU adds numbers twice as fast as it compares them.
    return jnp.all(jnp.asarray([jnp.sum(0 * leaf) == 0 for leaf in jax.tree.leaves(tree)], dtype=bool))
