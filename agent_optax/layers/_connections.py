"""Which weights of a sparse layer exist."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from agent_optax._validation import check_fraction, check_positive_int
from agent_optax.correction._layout import Layout
from agent_optax.layers._places import Places
from agent_optax.layers._point import Point
from agent_optax.sparsity._pattern import Pattern


class Connections(Layout):
    r"""Which of the weights of a layer with `inputs` inputs and `outputs` outputs exist: `FanIn` or `AnyMask`.

    Connections are a pytree of int32 arrays with static shapes: they pass through `jax.jit`, `jax.vmap` and
    `jax.lax.scan`, are saved in checkpoints as other arrays are, and hold no weights. The weights, `values` of shape
    `values_shape`, are an array of their own, every entry of which is a weight: any optimizer works on it as it is.

    Attributes:
        inputs: the number of inputs; kernel height times width times input channels for a convolution.
        outputs: the number of outputs.
        values_shape: the shape of the weights that go with these connections.
        num_weights: how many weights exist.
        density: `num_weights` over `inputs` times `outputs`.
    """

    inputs: int
    outputs: int
    group: int  # consecutive outputs that have the same inputs
    point: Point | None

    @property
    def values_shape(self) -> tuple[int, ...]:
        """The shape of the weights."""
        raise NotImplementedError

    @property
    def num_weights(self) -> int:
        """How many weights exist."""
        raise NotImplementedError

    @property
    def density(self) -> float:
        """The share of weights that exist."""
        return self.num_weights / (self.inputs * self.outputs)

    def forward_flops(self, num_positions: int = 1) -> int:
        r"""Floating-point operations of a forward pass, two for each multiply-add; a backward pass takes twice as many.

        .. math::
            \mathrm{FLOPs} = 2 \times \text{positions} \times \text{weights}

        Args:
            num_positions: how often each weight is used: the batch size, times the length of sequences, or times height
                and width of a convolution's output. Default 1.

        Returns:
            The number. That of a dense layer is this over `density`.
        """
        return 2 * num_positions * self.num_weights

    def mask(self) -> jax.Array:
        """Bool [inputs, outputs]: True where a weight exists."""
        raise NotImplementedError

    def dense(self, values: jax.Array) -> jax.Array:
        """[inputs, outputs]: the weights as a dense kernel."""
        raise NotImplementedError

    def gather(self, kernel: jax.Array) -> jax.Array:
        """The weights of a dense kernel [inputs, outputs] that exist."""
        raise NotImplementedError

    def coordinates(self) -> tuple[jax.Array, jax.Array]:
        """Input and output of each weight, int32 [num_weights] each: sorted by output, then by input."""
        raise NotImplementedError

    # What `rewire` needs: a layer in units that exist or not as a whole.

    @property
    def pattern(self) -> Pattern:
        """The pattern that a mask must keep to be one of these connections."""
        raise NotImplementedError

    def unit_part(self, values: jax.Array, start: Any, number: int) -> tuple[jax.Array, jax.Array]:
        """[inputs, units], weights and mask: so many consecutive outputs, in units of the pattern."""
        raise NotImplementedError

    def with_unit_mask(self, mask: jax.Array) -> Self:
        """Connections of the same shapes, of another mask."""
        raise NotImplementedError

    @property
    def places(self) -> jax.Array:
        """int32 [rows, k], sorted: where the weights of each row are, of `num_places` places."""
        raise NotImplementedError

    @property
    def num_places(self) -> int:
        """How many places a row has."""
        raise NotImplementedError

    def with_places(self, places: jax.Array) -> Self:
        """Connections with other places, possibly more or fewer in each row."""
        raise NotImplementedError

    def in_columns(self, values: jax.Array) -> jax.Array:
        """[k, n]: the weights, one under the other where they are in one row of `places`."""
        return values.T if values.ndim == 2 else values[:, None]

    def places_in(self, other: Self) -> Places:
        """Where the weights are among those of connections of the same shapes."""
        raise NotImplementedError

    # A point whose parameters were stored with other connections: see `agent_optax.correction`.

    def without_point(self) -> Self:
        """Only what a layer multiplies by."""
        return self if self.point is None else dataclasses.replace(self, point=None)  # type: ignore[type-var]

    @property
    def parameter(self) -> str | None:
        """The name of the weights, if connections have changed while a point was stored."""
        return None if self.point is None else self.point.parameter

    def at_point(self, num_refreshes: jax.Array) -> Self:
        """The connections of the stored point."""
        assert self.point is not None
        is_valid = self.point.num_refreshes == num_refreshes
        now = self.without_point()
        return jax.tree.map(lambda old, new: jnp.where(is_valid, old, new), self.point.connections, now)

    def from_point(self, old_grads: jax.Array, num_refreshes: jax.Array) -> jax.Array:
        """A gradient at the stored point, for the weights of now; zero for weights grown since."""
        assert self.point is not None
        places = self.places_in(self.point.connections)
        known = jnp.where(self.point.is_kept, old_grads, 0)
        is_valid = self.point.num_refreshes == num_refreshes
        return jnp.where(is_valid, places.take(known, jnp.zeros_like(old_grads)), old_grads)

    # The three sides of the trilinear form sum_o dy_o W_oi z_i, for a block of columns, features first; z are the
    # inputs that `lookups` names.

    @property
    def lookups(self) -> jax.Array | None:
        """int32: the inputs that the products are to be given, in this order; None for all as they are."""
        raise NotImplementedError

    @property
    def num_columns(self) -> int:
        """How many columns to work on at a time."""
        raise NotImplementedError

    def product(self, values: jax.Array, z: jax.Array) -> jax.Array:
        """[*lookups, columns] -> [outputs, columns]."""
        raise NotImplementedError

    def transposed_product(self, values: jax.Array, dy: jax.Array) -> jax.Array:
        """[outputs, columns] -> [*lookups, columns]."""
        raise NotImplementedError

    def weight_gradient(self, z: jax.Array, dy: jax.Array) -> jax.Array:
        """[*lookups, columns], [outputs, columns] -> the shape of the weights."""
        raise NotImplementedError


def check_random(inputs: int, outputs: int, density: float) -> None:
    """Raises ValueError unless connections of these numbers can be drawn."""
    check_positive_int("inputs", inputs, "it is the number of inputs of the layer")
    check_positive_int("outputs", outputs, "it is the number of outputs of the layer")
    check_fraction("density", density, "it is the share of weights that exist, such as 0.05")


def check_in_range(indices: np.ndarray, inputs: int) -> None:
    """Raises ValueError unless all are inputs of the layer."""
    if indices.min() < 0 or indices.max() >= inputs:
        wrong = indices[(indices < 0) | (indices >= inputs)][0]
        raise ValueError(f"indices must lie between 0 and {inputs - 1}, the last of the inputs, got {wrong}.")
