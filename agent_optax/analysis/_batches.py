"""What every measurement over batches does first: checks of its arguments, and masked gradients in full precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from agent_optax._tree import check_floating, is_masked, select_active, wide_dtype
from agent_optax.sparsity._given_masks import given_masks

MaskedGrads = Callable[[optax.Params, Any], tuple[jax.Array, optax.Updates]]


def check_batches(batches: Any) -> int:
    """Returns the number of batches; ValueError unless every leaf has it as its leading axis."""
    shapes = {
        jax.tree_util.keystr(path) or "batches": jnp.shape(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(batches)
    }
    lengths = {shape[:1] for shape in shapes.values()}
    if len(lengths) != 1 or () in lengths or (0,) in lengths:
        raise ValueError(
            "batches must be a tree of arrays with one leading axis of batches, of the same, non-zero length in every "
            f"leaf, got shapes {shapes}. Stack separate batches with jax.tree.map(lambda *b: jnp.stack(b), *batches)."
        )
    return lengths.pop()[0]


def check_like_params(name: str, tree: Any, params: optax.Params) -> None:
    """Raises ValueError unless `tree` has the structure and the shapes of `params`."""
    if jax.tree.structure(tree) != jax.tree.structure(params):
        raise ValueError(
            f"{name} must be a tree like params, {jax.tree.structure(params)}, got {jax.tree.structure(tree)}: pass "
            "parameters of the same model, such as agent_optax.snapshot_params(opt_state, params)."
        )
    for (path, leaf), p in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(params), strict=True):
        if jnp.shape(leaf) != jnp.shape(p):
            raise ValueError(
                f"{name} must have the shapes of params, but {jax.tree_util.keystr(path) or 'the leaf'} has shape "
                f"{jnp.shape(leaf)} and params there {jnp.shape(p)}: pass parameters of the same model."
            )


def checked_masks(params: optax.Params, masks: Any) -> Any:
    """The masks with MaskedNode for None; None for no masks at all. Checks `params` too."""
    check_floating(params, "agent_optax.analysis")
    return None if masks is None else given_masks(params, masks)


def masked_grads(loss_fn: Callable[..., Any], masks: Any, has_aux: bool) -> MaskedGrads:
    """A function ``(params, batch) -> (loss, grads)``: zero at inactive weights, float32 at least."""
    evaluate = jax.value_and_grad(loss_fn, has_aux=has_aux)

    def loss_and_grads(params: optax.Params, batch: Any) -> tuple[jax.Array, optax.Updates]:
        output, grads = evaluate(params, batch)
        return (output[0] if has_aux else output), select_active(widened(grads), masks)

    return loss_and_grads


def widened(tree: optax.Updates) -> optax.Updates:
    """Leaves in float32, or float64 where they are."""
    return jax.tree.map(lambda x: x if is_masked(x) else x.astype(wide_dtype(x.dtype)), tree, is_leaf=is_masked)


def zeros_like_widened(params: optax.Params) -> optax.Updates:
    """Zeros in the shapes of `params`, in the dtype in which gradients are summed."""
    return widened(jax.tree.map(jnp.zeros_like, params))


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """The inner product of two arrays of one shape."""
    return jnp.sum(a * b)


def tree_total(tree: Any) -> jax.Array:
    """The sum of the scalars in a tree."""
    return sum(jax.tree.leaves(tree), jnp.zeros((), jnp.float32))
