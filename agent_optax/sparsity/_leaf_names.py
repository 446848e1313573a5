"""The names of the leaves of a tree of parameters."""

from __future__ import annotations

import sys
from typing import Any

import jax
import optax

from agent_optax._tree import is_absent


def path_name(path: tuple[Any, ...]) -> str:
    """A path in a tree as text: 'Dense_0/kernel'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaf_names(params: optax.Params) -> list[str]:
    """The names of the leaves; the boxes in which Flax keeps arrays add nothing to them."""
    named_nodes = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_flax_box)
    return [path_name(path) for path, node in named_nodes for _ in jax.tree.leaves(node)]


def named_nodes(tree: Any) -> list[tuple[str, Any]]:
    """The names of the leaves and what is there; also of None and of what is hidden."""
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: is_absent(node) or _is_flax_box(node))
    named = []
    for path, node in nodes:
        leaves = [None] if is_absent(node) else jax.tree.leaves(node) or [None]
        named += [(path_name(path), leaf) for leaf in leaves]
    return named


def _is_flax_box(node: Any) -> bool:
    """Tells a `flax.nnx.Variable` or `flax.linen.Partitioned`; Flax is not imported here, for it is optional."""
    boxes = (("flax.nnx.variablelib", "Variable"), ("flax.core.meta", "AxisMetadata"))
    return any(name in sys.modules and isinstance(node, getattr(sys.modules[name], cls)) for name, cls in boxes)
