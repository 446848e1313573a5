"""The axes of a leaf: the layers stacked in it, and the inputs and outputs of each."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from agent_optax.sparsity._layer import Layer
from agent_optax.sparsity.selection._tiles import laid_out_as, merge_axes, split_merged, whole_axis

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, init=False)
class Axes:
    r"""What the axes of a leaf are, for ``axes=``: every leaf is seen as layers of inputs and outputs.

    .. math::
        W \;\to\; [\text{stack}, \text{spatial} \ldots, \text{inputs}, \text{outputs}]

    Several axes of one role are merged, in the order in which they are named; spatial ones stay apart. Each entry of
    the stack is a layer of its own: with its own number of active weights, its own selection and its own share of the
    distribution, as if it were a leaf. A product sums over spatial and input axes.

    Args:
        stack: the axes along which layers lie: of `flax.linen.scan` and `flax.nnx.vmap`, of experts, of an ensemble.
        spatial: the axes of a filter, which sum as inputs do. `erk` counts each by itself, and `blocks` can take
            filters apart along them.
        inputs: the axes over which a product sums: one in a dense layer, two in the output projection of attention.
        outputs: the axes that a product leaves: one in a dense layer, two in the query of attention.

    Each is an int or a tuple of ints, and may be negative; each axis of the leaf is named once.

    Raises:
        TypeError: if an axis is no whole number; ValueError, from ``init``, unless each axis of the leaf is named once.

    Example:
        >>> import agent_optax, jax, jax.numpy as jnp, optax
        >>> params = {"wi": jnp.ones((16, 3, 8))}  # [inputs, layers, outputs]
        >>> axes = lambda name, shape: agent_optax.Axes(inputs=0, stack=1, outputs=2)
        >>> tx = agent_optax.sparsify(optax.sgd(0.1), agent_optax.static(), pattern=agent_optax.n_m(2, 4), axes=axes)
        >>> mask = agent_optax.active_masks(tx.init(params), params)["wi"]
        >>> bool((mask.reshape(4, 4, 3, 8).sum(1) == 2).all())  # of 4 inputs of one output of one layer
        True
    """

    stack: tuple[int, ...]
    spatial: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def __init__(
        self,
        stack: int | Sequence[int] = (),
        spatial: int | Sequence[int] = (),
        inputs: int | Sequence[int] = (),
        outputs: int | Sequence[int] = (),
    ) -> None:
        roles = {"stack": stack, "spatial": spatial, "inputs": inputs, "outputs": outputs}
        for name, axes in roles.items():
            object.__setattr__(self, name, _as_tuple(name, axes))

    def of_leaf(self, name: str, shape: Shape) -> Axes:
        """Counted from the first axis; ValueError unless each axis of the leaf is named once."""
        rank = len(shape)
        named = [axis for role in self._roles() for axis in role]
        if sorted(axis + rank if axis < 0 else axis for axis in named) != list(range(rank)):
            raise ValueError(
                f"axes= gives {self} for {name}, which has the shape {tuple(shape)}: name each of its {rank} axes "
                "exactly once."
            )
        return Axes(*(tuple(axis % rank for axis in role) for role in self._roles()))

    def num_layers(self, shape: Shape) -> int:
        """How many layers are stacked in a leaf."""
        return math.prod(shape[axis] for axis in self.stack)

    def layer_shape(self, shape: Shape) -> Shape:
        """Of each of them: [*spatial, inputs, outputs], without a role that has no axis."""
        merged = [math.prod(shape[axis] for axis in role) for role in (self.inputs, self.outputs) if role]
        return (*(shape[axis] for axis in self.spatial), *merged)

    def as_layers(self, x: jax.Array) -> jax.Array:
        """The leaf as [stack, *spatial, inputs, outputs]; without a stack it is the layer itself."""
        x = jnp.transpose(x, self._order())
        first = 0
        for group in self._groups():
            x = merge_axes(x, first, len(group))
            first += 1
        return x

    def as_leaf(self, layers: jax.Array, like: jax.Array) -> jax.Array:
        """The inverse, shaped and laid out as `like`."""
        first = 0
        for group in self._groups():
            layers = split_merged(layers, first, tuple(like.shape[axis] for axis in group))
            first += len(group)
        order = self._order()
        return laid_out_as(jnp.transpose(layers, [order.index(axis) for axis in range(len(order))]), like)

    def unstacked(self, x: jax.Array) -> list[jax.Array]:
        """Each layer of a leaf."""
        if not self.stack:
            return [self.as_layers(x)]
        layers = whole_axis(self.as_layers(x), 0)
        return [layers[i] for i in range(layers.shape[0])]

    def unstacked_layers(self, leaf: Layer) -> list[Layer]:
        """Each layer of a leaf, with all of its arrays."""
        if not self.stack:
            return [with_arrays(self.as_layers, leaf)]
        layers = self._whole_layers(leaf)
        return [with_arrays(lambda x, i=i: x[i], layers) for i in range(layers.mask.shape[0])]

    def restacked(self, layers: Sequence[jax.Array], like: jax.Array) -> jax.Array:
        """The inverse of `unstacked`."""
        return self.as_leaf(jnp.stack(layers) if self.stack else layers[0], like)

    def on_each_layer(
        self, function: Callable[[Layer, jax.Array], jax.Array], leaf: Layer, key: jax.Array, like: jax.Array
    ) -> jax.Array:
        """``function(layer, key)`` of each layer of a leaf, together as a leaf again.

        All layers at once, by `jax.vmap`. Where explicit sharding splits the stack over devices it is gathered for it:
        JAX cannot map loops over an axis that is split.
        """
        if not self.stack:
            return self.as_leaf(function(with_arrays(self.as_layers, leaf), key), like)
        layers = self._whole_layers(leaf)

        def of_layer(layer: Layer, i: jax.Array) -> jax.Array:
            return function(layer, jax.random.fold_in(key, i))

        return self.as_leaf(jax.vmap(of_layer)(layers, jnp.arange(layers.mask.shape[0], dtype=jnp.int32)), like)

    def _whole_layers(self, leaf: Layer) -> Layer:
        return with_arrays(lambda x: whole_axis(self.as_layers(x), 0), leaf._replace(count=None))

    def _roles(self) -> tuple[tuple[int, ...], ...]:
        return self.stack, self.spatial, self.inputs, self.outputs

    def _groups(self) -> list[tuple[int, ...]]:
        """The axes that become one each."""
        return [
            group for group in (self.stack, *((axis,) for axis in self.spatial), self.inputs, self.outputs) if group
        ]

    def _order(self) -> list[int]:
        return [axis for group in self._groups() for axis in group]


def with_arrays(function: Callable[[jax.Array], jax.Array], layer: Layer) -> Layer:
    """The layer with `function` of each of its arrays."""
    arrays = ("weights", "mask", "grads", "ever_active", "momentum", "statistic")
    return layer._replace(
        **{name: function(x) for name in arrays if (x := getattr(layer, name)) is not None},
    )


def _as_tuple(name: str, axes: Any) -> tuple[int, ...]:
    try:
        return tuple(map(operator.index, axes)) if isinstance(axes, (tuple, list)) else (operator.index(axes),)
    except TypeError as error:
        raise TypeError(f"{name} must be an axis or a tuple of axes, such as (0, 1), got {axes!r}.") from error
