"""The names of the leaves of a tree of parameters."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax
import optax

from agent_optax._tree import is_absent


def path_name(path: tuple[Any, ...]) -> str:
    """A path in a tree as text: 'Dense_0/kernel'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaf_names(params: optax.Params) -> list[str]:
    """The names of the leaves; the boxes in which Flax keeps arrays add nothing to them."""
    return [name for name, node in named_boxes(params) for _ in jax.tree.leaves(node)]


def named_boxes(tree: Any, is_leaf: Callable[[Any], bool] = lambda node: False) -> list[tuple[str, Any]]:
    """The names of the leaves and the leaves, in the boxes in which Flax keeps them."""
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: is_leaf(node) or _is_flax_box(node))
    return [(path_name(path), node) for path, node in nodes]


def named_nodes(tree: Any) -> list[tuple[str, Any]]:
    """The names of the leaves and what is there; also of None and of what is hidden."""
    named = []
    for name, node in named_boxes(tree, is_absent):
        leaves = [None] if is_absent(node) else jax.tree.leaves(node) or [None]
        named += [(name, leaf) for leaf in leaves]
    return named


def _is_flax_box(node: Any) -> bool:
    """Tells a `flax.nnx.Variable` or `flax.linen.Partitioned`; Flax is not imported here, for it is optional."""
    boxes = (("flax.nnx.variablelib", "Variable"), ("flax.core.meta", "AxisMetadata"))
    return any(name in sys.modules and isinstance(node, getattr(sys.modules[name], cls)) for name, cls in boxes)
