"""A leaf of the parameters that is pruned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from agent_optax.sparsity._axes import Axes, Shape
from agent_optax.sparsity._default_axes import AxesChoice, axes_of_leaves
from agent_optax.sparsity._leaf_names import leaf_names
from agent_optax.sparsity._pattern import Pattern, PatternChoice, patterns_of


class PrunedLeaf(NamedTuple):
    """A leaf that is pruned: one layer or a stack of them."""

    index: int  # among the leaves of params
    name: str
    shape: Shape
    axes: Axes
    pattern: Pattern

    @property
    def num_layers(self) -> int:
        """How many layers are stacked in it."""
        return self.axes.num_layers(self.shape)

    @property
    def layer_shape(self) -> Shape:
        """Of each of them: [*spatial, inputs, outputs]."""
        return self.axes.layer_shape(self.shape)

    def layer_names(self) -> list[str]:
        """The name of the leaf, with a number for each layer of a stack."""
        return [f"{self.name}[{i}]" for i in range(self.num_layers)] if self.axes.stack else [self.name]


def pruned_leaves(
    params: optax.Params, is_pruned: Sequence[bool], pattern: PatternChoice, axes: AxesChoice
) -> list[PrunedLeaf]:
    """The pruned leaves, in their order; ValueError where one cannot have its pattern."""
    names, shapes = leaf_names(params), [jnp.shape(leaf) for leaf in jax.tree.leaves(params)]
    indices = [i for i, chosen in enumerate(is_pruned) if chosen]
    patterns = patterns_of(pattern, [names[i] for i in indices])
    leaves = []
    for i, own, (of_leaf, is_known) in zip(
        indices, patterns, axes_of_leaves(axes, names, shapes, indices), strict=True
    ):
        if own.needs_axes and not is_known:
            raise ValueError(
                f"pattern={own} depends on which axes of a leaf are inputs, and nothing tells it of {names[i]}, whose "
                f"shape is {shapes[i]}: say so with axes=lambda name, shape: agent_optax.Axes(stack=0, inputs=1, "
                "outputs=2), say."
            )
        own.check(names[i], of_leaf.layer_shape(shapes[i]))
        leaves.append(PrunedLeaf(i, names[i], shapes[i], of_leaf, own))
    return leaves
