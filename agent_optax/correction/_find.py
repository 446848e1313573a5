"""Finding corrections inside the state of any Optax optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from agent_optax.correction._state import CorrectGradientsState


class StorageView:
    """How a correction stores parameters: as they are, unless the state of a wrapper provides another view."""

    __slots__ = ()

    def gather(self, tree: Any) -> Any:
        """From dense parameters to the storage of the correction."""
        return tree

    def scatter_point(self, tree: Any, params: Any) -> Any:
        """From the storage of the correction, as it was when the memory moved, to dense ones like `params`."""
        del params
        return tree

    def step_args(
        self, grads: optax.Updates, params: optax.Params, extra_args: dict[str, Any]
    ) -> tuple[optax.Updates, dict[str, Any]]:
        """The dense gradient and the extra arguments of a step, as the correction gets them."""
        del params
        return grads, extra_args


class CorrectionWrapper:
    """Base class of the state of an optimizer that stores the parameters of the corrections inside in its own way."""

    __slots__ = ()

    inner_state: Any  # in which the corrections are

    def storage_view(self) -> StorageView:
        """How the inner state stores parameters."""
        raise NotImplementedError

    def points_moved(self) -> Any:
        """The state after the memories in the inner state have moved to the current parameters."""
        raise NotImplementedError


def map_corrections(
    fn: Callable[[CorrectGradientsState, StorageView], CorrectGradientsState],
    opt_state: optax.OptState,
    view: StorageView | None = None,
    moves_points: bool = False,
) -> optax.OptState:
    """Applies ``fn(state, view)`` to each correction; `view` tells how it stores parameters.

    With ``moves_points=True``, `fn` moves the points of evaluation, and wrappers are notified.
    """
    seen = StorageView() if view is None else view

    def visit(node: Any) -> Any:
        if isinstance(node, CorrectGradientsState):
            return fn(node, seen)
        if isinstance(node, CorrectionWrapper):
            inner_state = map_corrections(fn, node.inner_state, node.storage_view(), moves_points)
            node = node._replace(inner_state=inner_state)  # type: ignore[attr-defined]  # a NamedTuple
            return node.points_moved() if moves_points else node
        return node

    return jax.tree.map(
        visit, opt_state, is_leaf=lambda node: isinstance(node, (CorrectGradientsState, CorrectionWrapper))
    )


def find_corrections(opt_state: optax.OptState) -> list[CorrectGradientsState]:
    """All corrections in a state."""
    found: list[CorrectGradientsState] = []

    def collect(state: CorrectGradientsState, view: StorageView) -> CorrectGradientsState:
        del view
        found.append(state)
        return state

    map_corrections(collect, opt_state)
    return found
