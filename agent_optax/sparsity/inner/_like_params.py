"""Extra arguments of `update`: which of them are arrays, and which have an array for each parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from agent_optax._tree import conform


def split_args(extra_args: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those that are arrays or numbers all through, and the others: functions, flags, None."""

    def is_numeric(arg: Any) -> bool:
        leaves = jax.tree.leaves(arg)
        return bool(leaves) and all(_is_array(x) or type(x) in (int, float, complex) for x in leaves)

    numeric = {name: arg for name, arg in extra_args.items() if is_numeric(arg)}
    return numeric, {name: arg for name, arg in extra_args.items() if name not in numeric}


def _is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))


def map_like_params(function: Callable[[Any], Any], extra_args: dict[str, Any], params: optax.Params) -> dict[str, Any]:
    """`function` of each extra argument that is a tree like `params`, such as old gradients; the others as they are.

    Leaves of `params` that an outer wrapper hides are hidden in those trees first.
    """
    mapped = dict(extra_args)
    for name, arg in extra_args.items():
        tree = like_params(arg, params)
        if tree is not None:
            mapped[name] = function(tree)
    return mapped


def like_params(arg: Any, params: optax.Params) -> Any:
    """`arg` with hidden leaves hidden, if it has an array of the same shape for each parameter; None otherwise."""
    try:
        tree = conform(arg, params)
        nodes = jax.tree.structure(params).flatten_up_to(tree)
    except (TypeError, ValueError):  # another tree
        return None
    pairs = list(zip(nodes, jax.tree.leaves(params), strict=True))
    is_like = all(_is_array(x) and jnp.shape(x) == jnp.shape(p) for x, p in pairs)
    return tree if is_like and pairs else None


def likely_extra_args(params: optax.Params) -> dict[str, Any]:
    """What updates of this library may be given, to look at an optimizer before its first step."""
    like = jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), jnp.result_type(p)), params)
    scalar = jnp.zeros((), jnp.float32)
    return {"value": scalar, "old_value": scalar, "old_grads": like, "batch_index": jnp.zeros((), jnp.int32)}
