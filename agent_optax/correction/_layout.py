"""Arguments of a loss that say which weights its parameters are, and may have changed since a point was stored."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from agent_optax.correction._find import find_corrections
from agent_optax.correction._state import CorrectGradientsState
from agent_optax.sparsity._leaf_names import leaf_names


class Layout:
    """Base class of what says which weights an array of parameters holds, such as the connections of a sparse layer.

    When it changes, old parameters that a memory has stored keep the layout that they were stored with.
    """

    @property
    def parameter(self) -> str | None:
        """The name of the parameter whose layout has changed since a point was stored; None if none has."""
        return None

    def at_point(self, num_refreshes: jax.Array) -> Any:
        """The layout of the stored point; `num_refreshes` tells whether that has been stored since the change."""
        raise NotImplementedError

    def from_point(self, old_grads: jax.Array, num_refreshes: jax.Array) -> jax.Array:
        """A gradient in the layout of the stored point, in this one: zero for weights that the memory does not know."""
        raise NotImplementedError


def is_layout(node: Any) -> bool:
    """Whether a node of a tree is a layout."""
    return isinstance(node, Layout)


def num_refreshes(opt_state: optax.OptState) -> jax.Array:
    """int32 []: how often the points of evaluation in a state have moved by `refresh`."""
    counts = [state.memory_state.num_refreshes for state in find_corrections(opt_state) if counts_moves(state)]
    return sum(counts, start=jnp.zeros((), jnp.int32))


def counts_moves(state: CorrectGradientsState) -> bool:
    """Whether the memory of a correction evaluates gradients at a point that moves with `refresh`, and counts that."""
    memory_state = state.memory_state
    return memory_state.evaluation_point() is not None and hasattr(memory_state, "num_refreshes")


def at_point(args: Any, opt_state: optax.OptState) -> Any:
    """The arguments of a loss, as they are at the stored point."""
    version = num_refreshes(opt_state)
    return jax.tree.map(
        lambda node: node.at_point(version) if is_layout(node) and node.parameter is not None else node,
        args,
        is_leaf=is_layout,
    )


def from_point(old_grads: optax.Updates, args: Any, opt_state: optax.OptState) -> optax.Updates:
    """A gradient that was taken at the stored point, in the layout that the parameters have now."""
    layouts = [node for node in jax.tree.leaves(args, is_leaf=is_layout) if is_layout(node)]
    changed = {node.parameter: node for node in layouts if node.parameter is not None}
    if not changed:
        return old_grads
    version, names = num_refreshes(opt_state), leaf_names(old_grads)
    missing = sorted(set(changed) - set(names))
    if missing:
        raise ValueError(
            f"a sparse layer was rewired whose weights were the parameter {missing[0]!r}, but the parameters are "
            f"{names}: pass the connections that rewire() returned for these parameters."
        )
    leaves, treedef = jax.tree.flatten(old_grads)
    return treedef.unflatten(
        [changed[name].from_point(g, version) if name in changed else g for name, g in zip(names, leaves, strict=True)]
    )
