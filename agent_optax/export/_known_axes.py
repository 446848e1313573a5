"""The axes of leaves, where a guess would not do."""

from __future__ import annotations

from collections.abc import Sequence

from agent_optax.sparsity._axes import Axes, Shape
from agent_optax.sparsity._default_axes import AxesChoice, axes_of_leaves


def known_axes(choice: AxesChoice, names: Sequence[str], shapes: Sequence[Shape], indices: Sequence[int]) -> list[Axes]:
    """The axes of the leaves of these indices in a tree; ValueError if nothing tells them."""
    found = axes_of_leaves(choice, names, shapes, indices)
    for i, (_, is_known) in zip(indices, found, strict=True):
        if not is_known:
            raise ValueError(
                f"nothing tells which axes of {names[i]}, of shape {shapes[i]}, are its inputs: say so with "
                "axes=lambda name, shape: agent_optax.Axes(stack=0, inputs=1, outputs=2), say."
            )
    return [axes for axes, _ in found]
