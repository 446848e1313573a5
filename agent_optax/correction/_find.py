"""Finding corrections inside the state of any Optax optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from agent_optax.correction._state import CorrectGradientsState


class DenseView:
    """How a correction stores parameters unless a wrapper says otherwise: as they are."""

    def gather(self, tree: Any) -> Any:
        """From dense parameters to the storage of the correction."""
        return tree

    def scatter_point(self, tree: Any, params: Any) -> Any:
        """From the storage of the correction, as it was when the memory moved, to dense ones like `params`."""
        del params
        return tree


def _stops(node: Any) -> bool:
    return isinstance(node, CorrectGradientsState) or hasattr(node, "storage_view")


def map_corrections(
    fn: Callable[[CorrectGradientsState, Any], CorrectGradientsState],
    opt_state: optax.OptState,
    view: Any = None,
    moves_points: bool = False,
) -> optax.OptState:
    """Applies ``fn(state, view)`` to each correction; `view` tells how it stores parameters.

    A wrapper that stores them in its own way has a method ``storage_view``, a field ``inner_state``, and a method
    ``points_moved`` that is told when `fn` has moved the points of evaluation (``moves_points=True``).
    """
    view = DenseView() if view is None else view

    def visit(node: Any) -> Any:
        if isinstance(node, CorrectGradientsState):
            return fn(node, view)
        if hasattr(node, "storage_view"):
            node = node._replace(inner_state=map_corrections(fn, node.inner_state, node.storage_view(), moves_points))
            return node.points_moved() if moves_points else node
        return node

    return jax.tree.map(visit, opt_state, is_leaf=_stops)


def find_corrections(opt_state: optax.OptState) -> list[CorrectGradientsState]:
    """All corrections in a state."""
    found: list[CorrectGradientsState] = []

    def collect(state: CorrectGradientsState, view: Any) -> CorrectGradientsState:
        del view
        found.append(state)
        return state

    map_corrections(collect, opt_state)
    return found
