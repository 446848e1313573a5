"""Trees that belong to the same parameters, though their classes differ: a model, its state, its arrays, a file."""

from __future__ import annotations

from typing import Any

import jax

from agent_optax._tree import is_absent, is_masked
from agent_optax.sparsity._leaf_names import leaf_names, named_nodes

MOST_NAMES = 6  # in an error


def matched_leaves(tree: Any, like: Any, what: str, is_prefix: bool = False, is_part: bool = False) -> list[Any]:
    """For each leaf of `like` what `tree` has in its place, None where that is None or hidden.

    Places are those of the structure; where the structures differ, those of the names. So the masks of a Flax model,
    of its state and of nested dictionaries from a file go with each other.

    Args:
        tree: a tree like `like`, in which None or a hidden part may stand for a subtree.
        like: a tree of arrays.
        what: the name of `tree` in errors, such as ``"masks="``.
        is_prefix: whether a leaf of `tree` may stand for a subtree of `like`.
        is_part: whether `tree` may lack leaves of `like`, as the state of an optimizer lacks what a model holds beside
            its parameters.

    Raises:
        ValueError: if `tree` has leaves of names that `like` has not, or lacks some.
    """
    try:
        return _by_structure(tree, like, is_prefix)
    except (ValueError, TypeError):  # as jax.tree.map says that structures differ
        pass
    nodes, places = named_nodes(tree), leaf_names(like)
    found = dict(nodes)
    absent = [name for name, node in nodes if node is None]  # None may stand for a subtree
    missing = [p for p in places if p not in found and not any(_is_above(name, p) for name in absent) and not is_part]
    unknown = [name for name, node in nodes if node is not None and name not in places]
    if missing or unknown or len(found) < len(nodes) or len(set(places)) < len(places):
        raise ValueError(
            f"{what} must be a tree like params, with None where nothing is pruned: params has {_listed(places)}; "
            f"{what} has {_listed([name for name, _ in nodes])}."
        )
    return [found.get(place) for place in places]


def restructured(tree: Any, like: Any) -> Any:
    """The leaves of `tree` in the structure of `like`, by their names where the structures differ.

    Where `like` is hidden it stays so.
    """
    try:
        return jax.tree.map(
            lambda node, subtree: node if is_masked(node) else _leaf(subtree), like, tree, is_leaf=is_masked
        )
    except (ValueError, TypeError):
        found = dict(zip(leaf_names(tree), jax.tree.leaves(tree), strict=True))
        names = iter(leaf_names(like))
        return jax.tree.map(lambda _: found[next(names)], like)


def _by_structure(tree: Any, like: Any, is_prefix: bool) -> list[Any]:
    found: list[Any] = []

    def place(node: Any, subtree: Any) -> None:
        leaves = jax.tree.leaves(subtree)
        absent = is_absent(node)
        if not absent and not is_prefix and not is_masked(subtree):
            _leaf(subtree)
        found.extend([None if absent else node] * len(leaves))

    jax.tree.map(place, tree, like, is_leaf=is_absent)
    return found


def _leaf(node: Any) -> Any:
    if not jax.tree_util.all_leaves([node]):
        raise ValueError("a subtree in the place of an array")
    return node


def _is_above(name: str, place: str) -> bool:
    return name == "" or place.startswith(name + "/")


def _listed(names: list[str]) -> str:
    shown = [name or "one array" for name in names[:MOST_NAMES]]
    return ", ".join(shown) + (f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else "")
