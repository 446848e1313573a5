"""Which arrays of an optimizer's state belong to which parameter."""

from __future__ import annotations

from typing import Any

import jax
import optax

from agent_optax.correction._memory import MemoryState

NO_LEAF = -1
Path = tuple[Any, ...]


def leaf_of_each_state(
    inner: optax.GradientTransformation, inner_state: optax.OptState, params: optax.Params, exempt: str | None
) -> list[int]:
    """For each array of the inner state the index of the parameter that it belongs to, or NO_LEAF.

    The trees like params are those that `optax.tree.map_params` finds. In them an array belongs to the parameter whose
    path begins its own; its trailing axes must be those of the parameter. The fields that the method `exempt` of a
    memory names belong to none.
    """
    paths = {path: i for i, (path, _) in enumerate(jax.tree_util.tree_leaves_with_path(params))}
    shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
    try:
        marked = _marked_by_optax(inner, inner_state, paths)
    except Exception:  # some optimizers cannot be initialized without an array, as Optax does to find these trees
        marked = jax.tree_util.tree_map_with_path(lambda path, _: _owner_within(path, paths), inner_state)

    def leave_out(node: Any) -> Any:
        if exempt is None or not isinstance(node, MemoryState):
            return node
        fields = {f: jax.tree.map(lambda _: NO_LEAF, getattr(node, f)) for f in getattr(node, exempt)()}
        return node._replace(**fields)  # type: ignore[attr-defined]  # a NamedTuple

    marked = jax.tree.map(leave_out, marked, is_leaf=lambda node: isinstance(node, MemoryState))

    def check(i: int, state: jax.Array) -> int:
        is_own = i != NO_LEAF and state.shape[state.ndim - len(shapes[i]) :] == shapes[i]
        return i if is_own else NO_LEAF

    return [check(i, state) for i, state in zip(jax.tree.leaves(marked), jax.tree.leaves(inner_state), strict=True)]


def _marked_by_optax(inner: optax.GradientTransformation, inner_state: optax.OptState, paths: dict[Path, int]) -> Any:
    def mark(like_params: Any) -> Any:  # a whole tree: some optimizers keep several arrays a parameter
        return jax.tree_util.tree_map_with_path(lambda path, _: _owner(path, paths), like_params)

    return optax.tree.map_params(
        inner.init, mark, inner_state, transform_non_params=lambda _: NO_LEAF, is_leaf=lambda _: True
    )


def _owner(path: Path, paths: dict[Path, int]) -> int:
    """The parameter whose path begins this one."""
    starts = (paths.get(path[:length]) for length in range(len(path) + 1))
    return next((i for i in starts if i is not None), NO_LEAF)


def _owner_within(path: Path, paths: dict[Path, int]) -> int:
    """The parameter whose path is a part of this one, as near to its end as can be."""
    owners = (_owner(path[start:], paths) for start in reversed(range(len(path) + 1)))
    return next((i for i in owners if i != NO_LEAF), NO_LEAF)
