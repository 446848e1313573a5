"""Whether an inner optimizer steps on the active entries as it does on whole parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from agent_optax.sparsity._pruned_leaf import PrunedLeaf
from agent_optax.sparsity._sparse_optimizer import SparseOptimizer
from agent_optax.sparsity._where import is_function
from agent_optax.sparsity.inner._like_params import likely_extra_args, map_like_params, split_args
from agent_optax.sparsity.inner._same_program import first_difference
from agent_optax.sparsity.inner._traits import trace_update
from agent_optax.sparsity.storages._compact_active import entries_shape


def check_on_entries(
    optimizer: SparseOptimizer,
    grads: optax.Updates,
    params: optax.Params,
    extra_args: dict[str, Any] | None,
    pruned: Sequence[PrunedLeaf],
    indices: Any,
) -> None:
    """Raises ValueError, naming the reason, if it does not.

    It is traced on whole parameters and on their active entries. On whole ones every entry must be treated by itself,
    wherever it lies; sums over entries are harmless, for inactive ones add nothing to them. And both traces must be
    the same program, but for the shapes of arrays.

    With ``extra_args=None`` those that `agent_optax.value_and_grads` supplies are tried, and an optimizer that needs
    others is checked at its first step.
    """
    if extra_args is None:
        for guess in (likely_extra_args(params), {}):
            try:
                trace_update(optimizer.inner, grads, params, guess)
            except Exception:  # it needs arguments that only a step has
                continue
            return check_on_entries(optimizer, grads, params, guess, pruned, indices)
        return None
    _, others = split_args(extra_args)
    functions = [name for name, arg in others.items() if is_function(arg)]
    if functions:
        raise _refused(f"it is given the function {functions[0]}=, which would be called with active entries only")
    key = _kind(grads, params, extra_args, pruned, indices)
    if key in optimizer.studied:
        return None
    traits = optimizer.traits(grads, params, extra_args, pruned, exempt="point_fields")
    if traits.obstacles:
        raise _refused(f"this one applies to whole parameters: {', '.join(traits.obstacles)}")
    full = trace_update(optimizer.inner, grads, params, extra_args)
    on_entries = _on_entries(params, pruned, indices)
    try:
        compact = trace_update(
            optimizer.inner,
            on_entries(grads),
            on_entries(params),
            map_like_params(on_entries, extra_args, params),
        )
    except Exception as error:
        raise _refused(f"on active entries this one fails with {type(error).__name__}: {error}") from error
    if jax.tree.structure(full.outputs) != jax.tree.structure(compact.outputs):
        raise _refused("this one keeps another state for active entries than for whole parameters")
    difference = first_difference(full.jaxpr, compact.jaxpr)
    if difference is not None:
        raise _refused(f"this one reads the shape or the size of a parameter: on active entries {difference}")
    optimizer.studied[key] = True
    return None


def _refused(reason: str) -> ValueError:
    return ValueError(
        'storage="compact" keeps active entries only, and needs an inner optimizer that treats each entry alike, '
        f'wherever it lies; {reason}. Use storage="dense".'
    )


def _on_entries(params: optax.Params, pruned: Sequence[PrunedLeaf], indices: Any) -> Any:
    """A function that takes a tree like params to shapes, those of active entries where a leaf is pruned."""
    treedef = jax.tree.structure(params)
    positions = treedef.flatten_up_to(indices)
    is_pruned = {leaf.index for leaf in pruned}

    def on_entries(tree: Any) -> Any:
        shapes = [
            jax.ShapeDtypeStruct(
                entries_shape(positions[i], jnp.ndim(x)) if i in is_pruned else jnp.shape(x), jnp.result_type(x)
            )
            for i, x in enumerate(treedef.flatten_up_to(tree))
        ]
        return treedef.unflatten(shapes)

    return on_entries


def _kind(
    grads: optax.Updates, params: optax.Params, extra_args: dict[str, Any], pruned: Sequence[PrunedLeaf], indices: Any
) -> Any:
    numeric, others = split_args(extra_args)
    leaves, treedef = jax.tree.flatten((grads, params, numeric, indices))
    return (
        "on entries",
        treedef,
        tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves),
        tuple(sorted(others)),
        tuple(leaf.index for leaf in pruned),
    )
