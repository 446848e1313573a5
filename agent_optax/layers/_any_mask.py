"""Any set of weights."""

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
from agent_optax.layers._rows import MOST_COLUMNS, Rows, product, products_of_rows, rows_of, split_rows
from agent_optax.sparsity._pattern import Pattern, Unstructured
from agent_optax.sparsity.storages._positions import positions


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["rows", "transposed", "slots", "point"],
    meta_fields=["inputs", "outputs"],
)
@dataclasses.dataclass(frozen=True)
class AnyMask(Connections):
    r"""Any set of weights, in an array of one axis.

    .. math::
        y_o = \sum_{n : o_n = o} v_n\, x_{i_n}

    With weights v [N], sorted by output and then by input. The inputs of each output are cut into pieces of equal
    length, so that shapes depend on the number of weights and not on where they are: masks with equal numbers run in
    the same compiled program.

    Make one with `AnyMask.random`, `AnyMask.from_mask` or `AnyMask.from_indices`.

    Attributes:
        rows: the inputs of each output.
        transposed: the outputs of each input, for the gradient with respect to x.
        slots: int32 [N]: where each weight is in `rows`.
        inputs: the number of inputs.
        outputs: the number of outputs.
        point: after `agent_optax.layers.rewire`, the connections of the snapshot that a correction has stored before.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from agent_optax import layers
        >>> mask = jnp.array([[True, False], [True, True], [False, False]])
        >>> connections = layers.AnyMask.from_mask(mask)
        >>> layers.sparse_dot(jnp.array([1.0, 10.0, 100.0]), jnp.ones(connections.values_shape), connections)
        Array([11., 10.], dtype=float32)
    """

    rows: Rows
    transposed: Rows
    slots: jax.Array
    inputs: int
    outputs: int
    point: Point | None = None
    group = 1  # of outputs that have the same inputs

    @classmethod
    def random(cls, key: jax.Array, *, inputs: int, outputs: int, density: float) -> AnyMask:
        r"""Weights drawn at random.

        There are :math:`\max(1, \mathrm{round}(\text{density} \times \text{inputs} \times \text{outputs}))` of them.

        Args:
            key: a random key, a known one: not under `jax.jit`.
            inputs: the number of inputs.
            outputs: the number of outputs.
            density: the share of weights that exist, in [0, 1].

        Returns:
            The connections.

        Raises:
            ValueError: if a number is out of range.
        """
        check_random(inputs, outputs, density)
        size = inputs * outputs
        seed = np.asarray(jax.random.bits(key, (4,)))
        num_weights = max(1, round(density * size))
        positions = np.sort(np.random.default_rng(seed).choice(size, num_weights, replace=False, shuffle=False))
        return _connect(positions % inputs, positions // inputs, inputs, outputs)

    @classmethod
    def from_indices(cls, indices: Any, indptr: Any, *, inputs: int) -> AnyMask:
        """Given inputs of each output, one after another: the compressed sparse rows of a matrix [outputs, inputs].

        Args:
            indices: int [N], known ones: not under `jax.jit`. The inputs of the first output in increasing order, then
                those of the second, and so on.
            indptr: int [outputs + 1]: output o has the inputs ``indices[indptr[o]:indptr[o + 1]]``.
            inputs: the number of inputs.

        Returns:
            The connections, whose weights are in the order of `indices`.

        Raises:
            ValueError: if `indptr` does not divide `indices` among outputs, or an index is out of range, or indices of
                an output do not increase.

        Example:
            >>> from agent_optax import layers
            >>> layers.AnyMask.from_indices([0, 2, 1], [0, 2, 3], inputs=3).mask().astype(int)
            Array([[1, 0],
                   [0, 1],
                   [1, 0]], dtype=int32)
        """
        check_positive_int("inputs", inputs, "it is the number of inputs of the layer")
        columns, bounds = np.asarray(indices), np.asarray(indptr)
        if columns.ndim != 1 or columns.size == 0 or columns.dtype.kind not in "iu":
            raise ValueError(
                f"indices must be whole numbers [N], at least one, got {columns.dtype} {list(columns.shape)}."
            )
        if bounds.ndim != 1 or len(bounds) < 2 or bounds.dtype.kind not in "iu":
            raise ValueError(
                f"indptr must be whole numbers [outputs + 1], at least two, got {bounds.dtype} {list(bounds.shape)}."
            )
        counts = np.diff(bounds.astype(np.int64))
        if bounds[0] != 0 or bounds[-1] != len(columns) or counts.min() < 0:
            raise ValueError(
                f"indptr must rise from 0 to {len(columns)}, the number of indices, got one from {bounds[0]} to "
                f"{bounds[-1]}" + (f" that falls after entry {counts.argmin()}." if counts.min() < 0 else ".")
            )
        check_in_range(columns, inputs)
        outputs = np.repeat(np.arange(len(counts)), counts)
        is_wrong = (columns[1:] <= columns[:-1]) & (outputs[1:] == outputs[:-1])
        if is_wrong.any():
            n = is_wrong.argmax()
            raise ValueError(
                f"indices of an output must increase: output {outputs[n]} has {columns[n]} and then {columns[n + 1]}. "
                "Sort them, and the weights with them."
            )
        return _connect(columns, outputs, inputs, len(counts))

    @classmethod
    def from_mask(cls, mask: Any) -> AnyMask:
        """The connections that a mask allows.

        Args:
            mask: bool [inputs, outputs], True where a weight exists, at least once; a known one: not under `jax.jit`.

        Returns:
            The connections.

        Raises:
            ValueError: if the mask is not a bool array of two axes, or is False everywhere.
            TypeError: if it is traced.
        """
        mask = as_mask(mask)
        outputs, inputs = np.nonzero(mask.T)
        if len(outputs) == 0:
            raise ValueError(f"mask must be True somewhere, got one of shape {list(mask.shape)} that is nowhere.")
        return _connect(inputs, outputs, *mask.shape)

    @property
    def values_shape(self) -> tuple[int, ...]:
        """[N]."""
        return self.slots.shape[-1:]

    @property
    def num_weights(self) -> int:
        """N: how many weights exist."""
        return self.slots.shape[-1]

    def mask(self) -> jax.Array:
        """Bool [inputs, outputs]: True where a weight exists."""
        return self.dense(jnp.ones(self.values_shape, bool))

    def dense(self, values: jax.Array) -> jax.Array:
        """[inputs, outputs]: the weights as a dense kernel."""
        return jnp.zeros((self.inputs, self.outputs), values.dtype).at[self.coordinates()].set(values)

    def gather(self, kernel: jax.Array) -> jax.Array:
        """The weights of a dense kernel [inputs, outputs] that exist."""
        return kernel[self.coordinates()]

    def coordinates(self) -> tuple[jax.Array, jax.Array]:
        """Input and output of each weight, int32 [N] each."""
        num_pieces = self.rows.segments.shape[0]
        return self.rows.sources.reshape(-1)[self.slots], self.rows.segments[self.slots % num_pieces]

    @property
    def pattern(self) -> Pattern:
        """Any mask."""
        return Unstructured()

    def unit_part(self, values: jax.Array, start: Any, number: int) -> tuple[jax.Array, jax.Array]:
        """[inputs, number], weights and mask of so many consecutive outputs."""
        inputs, outputs = self.coordinates()
        place = jnp.where(outputs < start, number, outputs - start)  # others than those of the part are beyond its end
        nothing = jnp.zeros((self.inputs, number), values.dtype)
        weights = nothing.at[inputs, place].set(values, mode="drop")
        return weights, nothing.astype(bool).at[inputs, place].set(True, mode="drop")

    def with_unit_mask(self, mask: jax.Array) -> AnyMask:
        """Connections of the same shapes, of another mask."""
        return self.with_places(positions(jnp.packbits(mask.T), self.num_weights)[None])

    @property
    def places(self) -> jax.Array:
        """[1, N]: where each weight is, counted input by input for each output."""
        inputs, outputs = self.coordinates()
        return (outputs * self.inputs + inputs)[None]

    @property
    def num_places(self) -> int:
        """The number of inputs times that of outputs."""
        return self.inputs * self.outputs

    def with_places(self, places: jax.Array) -> AnyMask:
        """Connections with other weights."""
        return _connect(places[0] % self.inputs, places[0] // self.inputs, self.inputs, self.outputs)

    def places_in(self, other: AnyMask) -> Places:
        """Where the weights are among those of connections of the same shapes."""
        own, others = self.places[0], other.places[0]
        place = jnp.minimum(jnp.searchsorted(others, own).astype(jnp.int32), self.num_weights - 1)
        return Places(place, others[place] == own)

    @property
    def lookups(self) -> None:
        """All inputs."""
        return None

    @property
    def num_columns(self) -> int:
        """How many columns to work on at a time."""
        return MOST_COLUMNS

    def product(self, values: jax.Array, z: jax.Array) -> jax.Array:
        """[inputs, columns] -> [outputs, columns]."""
        return product(self.rows, values, z)

    def transposed_product(self, values: jax.Array, dy: jax.Array) -> jax.Array:
        """[outputs, columns] -> [inputs, columns]."""
        return product(self.transposed, values, dy)

    def weight_gradient(self, z: jax.Array, dy: jax.Array) -> jax.Array:
        """[inputs, columns], [outputs, columns] -> [N]."""
        products = products_of_rows(
            self.rows.sources, z, rows_of(dy, jnp.minimum(self.rows.segments, self.outputs - 1))
        )
        return products.reshape(-1)[self.slots]


def _connect(input_of: Any, output_of: Any, inputs: int, outputs: int) -> AnyMask:
    input_ids, output_ids = jnp.asarray(input_of, jnp.int32), jnp.asarray(output_of, jnp.int32)
    rows, slots = split_rows(output_ids, input_ids, outputs)
    transposed, _ = split_rows(input_ids, output_ids, inputs)
    return AnyMask(rows, transposed, slots, inputs, outputs)
