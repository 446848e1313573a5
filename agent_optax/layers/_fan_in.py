"""Every output has the same number of inputs, and a group of outputs has the same ones."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from agent_optax._validation import check_positive_int
from agent_optax.layers._as_mask import as_mask
from agent_optax.layers._connections import Connections, check_in_range, check_random
from agent_optax.layers._places import Places
from agent_optax.layers._point import Point
from agent_optax.layers._row_major import row_major
from agent_optax.layers._rows import MOST_COLUMNS, Rows, product, products_of_rows, split_rows, sums_of_rows
from agent_optax.sparsity._layer import Layer
from agent_optax.sparsity._pattern import Pattern
from agent_optax.sparsity.patterns import fan_in as fan_in_pattern
from agent_optax.sparsity.storages._positions import positions

SMALLEST_PRODUCT = 16  # outputs of a group from which on one matrix product a group is faster than sums of rows
LARGEST_GATHER = 2**24  # numbers: inputs of all groups that are looked up at a time, to bound the memory


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["indices", "transposed", "point"],
    meta_fields=["inputs", "outputs", "group"],
)
@dataclasses.dataclass(frozen=True)
class FanIn(Connections):
    r"""Each group of G consecutive outputs has the same k inputs; each output weighs them for itself.

    .. math::
        y_o = \sum_{j=1}^{k} v_{oj}\, x_{c_{gj}}, \qquad g = \lfloor o / G \rfloor

    With weights v [outputs, k] and inputs c [groups, k], sorted. G = 1 is constant fan-in. The larger G is, the faster:
    a group is one small matrix product, and its inputs are looked up once. Groups of fewer than 16 outputs are
    computed as sums of rows, output by output. If G does not divide the outputs, the last group is smaller, and every
    entry of the weights is a weight nevertheless.

    Make one with `FanIn.random`, `FanIn.from_mask` or `FanIn.from_indices`.

    Attributes:
        indices: int32 [groups, k]: the inputs of each group.
        transposed: for G < 16, the outputs of each input, for the gradient with respect to x; else None.
        inputs: the number of inputs.
        outputs: the number of outputs.
        group: G.
        point: after `agent_optax.layers.rewire`, the connections of the snapshot that a correction has stored before.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from agent_optax import layers
        >>> connections = layers.FanIn.random(jax.random.key(0), inputs=64, outputs=32, density=0.125, group=16)
        >>> connections.indices.shape, connections.values_shape, connections.num_weights
        ((2, 8), (32, 8), 256)
        >>> values = jnp.ones(connections.values_shape)
        >>> layers.sparse_dot(jnp.ones((4, 64)), values, connections)[0, 0].item()
        8.0

    References:
        Lasby et al., Dynamic Sparse Training with Structured Sparsity, ICLR 2024, for constant fan-in.
    """

    indices: jax.Array
    transposed: Rows | None
    inputs: int
    outputs: int
    group: int
    point: Point | None = None

    @classmethod
    def random(cls, key: jax.Array, *, inputs: int, outputs: int, density: float, group: int = 16) -> FanIn:
        r"""Inputs of each group drawn at random, without repetition.

        Each output has :math:`k = \max(1, \mathrm{round}(\text{density} \times \text{inputs}))` inputs.

        Args:
            key: a random key.
            inputs: the number of inputs.
            outputs: the number of outputs.
            density: the share of weights that exist, in [0, 1].
            group: G, how many consecutive outputs share their inputs. Default 16: from there on a group is
                one matrix product. Small layers lose accuracy in groups, see the results; 1 loses none.

        Returns:
            The connections.

        Raises:
            ValueError: if a number is out of range.
        """
        check_random(inputs, outputs, density)
        check_positive_int("group", group, "it is the number of consecutive outputs that share their inputs")
        k = fan_in(inputs, density)
        num_groups = -(-outputs // group)
        return _connect(_random_indices(key, num_groups, inputs, k), inputs, outputs, group)

    @classmethod
    def from_indices(cls, indices: Any, *, inputs: int, outputs: int, group: int = 1) -> FanIn:
        """Given inputs of each group.

        Args:
            indices: int [groups, k], known ones: not under `jax.jit`.
            inputs: the number of inputs.
            outputs: the number of outputs.
            group: how many consecutive outputs share their inputs. Default 1: each output has its own.

        Returns:
            The connections, with the inputs of each group sorted.

        Raises:
            ValueError: if the shape does not fit, or an index is out of range or repeated within its group.
        """
        check_positive_int("group", group, "it is the number of consecutive outputs that share their inputs")
        rows = np.sort(np.asarray(indices), axis=-1)
        num_groups = -(-outputs // group)
        if rows.ndim != 2 or len(rows) != num_groups or rows.shape[1] == 0:
            raise ValueError(
                f"indices must have the shape [{num_groups}, k], one row for each group of {group} of the {outputs} "
                f"outputs, got {list(np.shape(indices))}."
            )
        if rows.dtype.kind not in "iu":
            raise ValueError(f"indices must be whole numbers, got {rows.dtype}.")
        check_in_range(rows, inputs)
        repeated = np.argwhere(rows[:, 1:] == rows[:, :-1])
        if len(repeated):
            g, j = repeated[0]
            raise ValueError(f"indices must not repeat an input within a group: group {g} has {rows[g, j]} twice.")
        return _connect(jnp.asarray(rows, jnp.int32), inputs, outputs, group)

    @classmethod
    def from_mask(cls, mask: Any, *, group: int = 1) -> FanIn:
        """The connections that a mask allows.

        Args:
            mask: bool [inputs, outputs], True where a weight exists; a known one: not under `jax.jit`.
            group: how many consecutive outputs share their inputs. Default 1: each output has its own.

        Returns:
            The connections.

        Raises:
            ValueError: if outputs have different numbers of inputs, or the outputs of a group different inputs.
        """
        mask = as_mask(mask)
        inputs, outputs = mask.shape
        check_positive_int("group", group, "it is the number of consecutive outputs that share their inputs")
        counts = mask.sum(axis=0)
        if counts.min() != counts.max() or counts.min() == 0:
            raise ValueError(
                "every output of a FanIn must have the same number of inputs, at least 1; in this mask they have "
                f"between {counts.min()} and {counts.max()}. Use AnyMask.from_mask."
            )
        first = np.arange(outputs) // group * group
        differs = np.flatnonzero((mask != mask[:, first]).any(axis=0))
        if len(differs):
            o = differs[0]
            raise ValueError(
                f"the outputs of a group must have the same inputs; with group={group}, output {o} differs from output "
                f"{first[o]}. Use a smaller group, or AnyMask.from_mask."
            )
        indices = np.nonzero(mask[:, ::group].T)[1].reshape(-1, counts[0])
        return _connect(jnp.asarray(indices, jnp.int32), inputs, outputs, group)

    @property
    def fan_in(self) -> int:
        """k: the number of inputs of each output."""
        return self.indices.shape[-1]

    @property
    def values_shape(self) -> tuple[int, ...]:
        """[outputs, k]."""
        return (self.outputs, self.fan_in)

    @property
    def num_weights(self) -> int:
        """How many weights exist."""
        return self.outputs * self.fan_in

    def mask(self) -> jax.Array:
        """Bool [inputs, outputs]: True where a weight exists."""
        return self.dense(jnp.ones(self.values_shape, bool))

    def dense(self, values: jax.Array) -> jax.Array:
        """[inputs, outputs]: the weights as a dense kernel."""
        sources, outputs = self._sources(), jnp.arange(self.outputs)[:, None]
        return jnp.zeros((self.inputs, self.outputs), values.dtype).at[sources, outputs].set(values)

    def gather(self, kernel: jax.Array) -> jax.Array:
        """The weights of a dense kernel [inputs, outputs] that exist."""
        return kernel[self._sources(), jnp.arange(self.outputs)[:, None]]

    def coordinates(self) -> tuple[jax.Array, jax.Array]:
        """Input and output of each weight, int32 [outputs * k] each."""
        return self._sources().reshape(-1), jnp.repeat(jnp.arange(self.outputs, dtype=jnp.int32), self.fan_in)

    @property
    def pattern(self) -> Pattern:
        """Constant fan-in, shared by groups."""
        return fan_in_pattern(group=self.group)

    def unit_part(self, values: jax.Array, start: Any, number: int) -> tuple[jax.Array, jax.Array]:
        """[inputs, groups], weights and mask: so many consecutive outputs, whole groups, in units of the pattern."""
        indices = jax.lax.dynamic_slice_in_dim(self.indices, start // self.group, -(-number // self.group))
        existing = jax.lax.dynamic_slice_in_dim(values, start, number).T
        units = self.pattern.units(Layer(existing, jnp.ones_like(existing, dtype=bool), existing, None))
        return self._in_units(indices, units.weights.T), self._in_units(indices, units.mask.T)

    def _in_units(self, indices: jax.Array, numbers: jax.Array) -> jax.Array:
        """[groups, k] -> [inputs, groups]."""
        groups = jnp.arange(len(indices), dtype=jnp.int32)[:, None]
        return jnp.zeros((self.inputs, len(indices)), numbers.dtype).at[indices, groups].set(numbers)

    def with_unit_mask(self, mask: jax.Array) -> FanIn:
        """Connections of the same shapes, of another mask."""
        return self.with_places(jax.vmap(lambda bits: positions(bits, self.fan_in))(jnp.packbits(mask.T, axis=1)))

    @property
    def places(self) -> jax.Array:
        """[groups, k]: the inputs of each group."""
        return self.indices

    @property
    def num_places(self) -> int:
        """The number of inputs."""
        return self.inputs

    def with_places(self, places: jax.Array) -> FanIn:
        """Connections with other inputs."""
        return _connect(places, self.inputs, self.outputs, self.group)

    def places_in(self, other: FanIn) -> Places:
        """Where the weights are among those of connections of the same shapes."""
        place = jax.vmap(jnp.searchsorted)(other.indices, self.indices).astype(jnp.int32)
        place = jnp.minimum(place, self.fan_in - 1)
        is_there = jnp.take_along_axis(other.indices, place, axis=1) == self.indices
        return Places(self._of_outputs(place), self._of_outputs(is_there))

    @property
    def lookups(self) -> jax.Array | None:
        """The inputs of each group; all inputs for small groups."""
        return self.indices if self.transposed is None else None

    @property
    def num_columns(self) -> int:
        """How many columns to work on at a time."""
        return MOST_COLUMNS if self.transposed is not None else max(64, LARGEST_GATHER // self.indices.size)

    def product(self, values: jax.Array, z: jax.Array) -> jax.Array:
        """[*lookups, columns] -> [outputs, columns]."""
        if self.transposed is not None:
            return sums_of_rows(values.T, self._sources().T, z)
        return self.out_of_groups(jnp.einsum("gok,gkb->gob", self.in_groups(values), z))

    def transposed_product(self, values: jax.Array, dy: jax.Array) -> jax.Array:
        """[outputs, columns] -> [*lookups, columns]."""
        if self.transposed is not None:
            return product(self.transposed, values.reshape(-1), dy)
        return jnp.einsum("gok,gob->gkb", self.in_groups(values), self.in_groups(dy))

    def weight_gradient(self, z: jax.Array, dy: jax.Array) -> jax.Array:
        """[*lookups, columns], [outputs, columns] -> [outputs, k]."""
        if self.transposed is not None:
            return products_of_rows(self._sources().T, z, dy).T
        # Outputs last, and transposed then: up to twice as fast as the product with outputs first, which XLA would make
        # of the two if the layout between them were not fixed.
        by_group = row_major(jnp.einsum("gkb,gob->gko", z, self.in_groups(dy)))
        return self.out_of_groups(by_group.swapaxes(1, 2))

    def in_groups(self, rows: jax.Array) -> jax.Array:
        """[outputs, n] -> [groups, G, n]; what the last group lacks is zero."""
        missing = -len(rows) % self.group
        rows = jnp.pad(rows, ((0, missing), (0, 0))) if missing else rows
        return rows.reshape(-1, self.group, rows.shape[1])

    def out_of_groups(self, grouped: jax.Array) -> jax.Array:
        """[groups, G, n] -> [outputs, n]."""
        return grouped.reshape(-1, grouped.shape[-1])[: self.outputs]

    def _sources(self) -> jax.Array:
        """[outputs, k]: the inputs of each output."""
        return self._of_outputs(self.indices)

    def _of_outputs(self, rows: jax.Array) -> jax.Array:
        """[groups, k] -> [outputs, k]."""
        return jnp.repeat(rows, self.group, axis=0)[: self.outputs] if self.group > 1 else rows


def fan_in(inputs: int, density: float) -> int:
    """The number of inputs of each output."""
    return max(1, round(density * inputs))


def _connect(indices: jax.Array, inputs: int, outputs: int, group: int) -> FanIn:
    connections = FanIn(indices, None, inputs, outputs, group)
    if group >= SMALLEST_PRODUCT:
        return connections
    transposed, _ = split_rows(*connections.coordinates(), inputs)
    return dataclasses.replace(connections, transposed=transposed)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _random_indices(key: jax.Array, num_groups: int, inputs: int, k: int) -> jax.Array:
    """Draws k different numbers below `inputs` for each group, sorted; one group at a time, to bound the memory."""

    def draw(key: jax.Array) -> jax.Array:
        numbers = (jax.random.bits(key, (inputs,)) >> 8).astype(jnp.float32)  # exact; on a CPU top_k of floats is fast
        return jnp.sort(jax.lax.top_k(numbers, k)[1]).astype(jnp.int32)

    return jax.lax.map(draw, jax.random.split(key, num_groups))
