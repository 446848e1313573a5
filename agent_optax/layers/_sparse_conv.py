"""Convolutions with a sparse kernel."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from agent_optax.layers._connections import Connections
from agent_optax.layers._probe import product_with_probe
from agent_optax.layers._products import Columns, sparse_product
from agent_optax.layers._row_major import row_major
from agent_optax.layers._sharding import with_automatic_axes
from agent_optax.layers._sparse_dot import check_operands


def sparse_conv(
    x: jax.Array,
    values: jax.Array,
    connections: Connections,
    *,
    kernel_size: int | Sequence[int],
    strides: int | Sequence[int] = 1,
    padding: str | Sequence[tuple[int, int]] = "SAME",
) -> jax.Array:
    r"""A two-dimensional convolution without its bias, whose kernel is sparse.

    .. math::
        y_{b h w o} = \sum_{i, j, c} W_{i j c o}\; x_{b,\, s_h h + i - p_h,\, s_w w + j - p_w,\, c}

    with :math:`W_{ijco} = 0` unless the connections have input (i, j, c) for output o. Their inputs are the positions
    of the kernel, counted as in a kernel [height, width, channels in, channels out] that is reshaped to two axes:
    input :math:`(i\, k_w + j)\, c_{in} + c`. What is said of derivatives and precision at `sparse_dot` holds here.

    For `FanIn` with groups of 16 outputs or more, only the windows of x that a group needs are looked up. For other
    connections all windows of x are laid out first, which takes kernel height times width of the memory of x.

    Args:
        x: float [..., height, width, channels in].
        values: float, of the shape ``connections.values_shape``: the weights.
        connections: which weights exist, with height * width * channels in inputs.
        kernel_size: height and width of the kernel, or one number for both.
        strides: of the output in each direction, or one number for both. Default 1.
        padding: "SAME", "VALID", or ((top, bottom), (left, right)) zeros. Default "SAME".

    Returns:
        y [..., output height, output width, channels out].

    Raises:
        TypeError: if `connections` are none, or `x` and `values` are not real floating-point arrays.
        ValueError: if shapes do not fit the connections, or `kernel_size`, `strides` or `padding` are wrong.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from agent_optax import layers
        >>> connections = layers.FanIn.random(jax.random.key(0), inputs=3 * 3 * 16, outputs=32, density=0.1)
        >>> values = jax.random.normal(jax.random.key(1), connections.values_shape)
        >>> x = jax.random.normal(jax.random.key(2), (2, 8, 8, 16))
        >>> layers.sparse_conv(x, values, connections, kernel_size=3, strides=2).shape
        (2, 4, 4, 32)
    """
    x, values = check_operands(x, values, connections)
    kernel, steps = _pair("kernel_size", kernel_size), _pair("strides", strides)
    if x.ndim < 3:
        raise ValueError(f"x must have the shape [..., height, width, channels in], got {list(x.shape)}.")
    height, width, channels = x.shape[-3:]
    if math.prod(kernel) * channels != connections.inputs:
        raise ValueError(
            f"x has {channels} channels, which makes {math.prod(kernel) * channels} inputs with a kernel of "
            f"{kernel[0]} x {kernel[1]}; the connections have {connections.inputs}."
        )
    if isinstance(padding, str) and padding not in ("SAME", "VALID"):
        raise ValueError(f'padding must be "SAME", "VALID" or ((top, bottom), (left, right)), got {padding!r}.')
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads((height, width), kernel, steps, padding)
    pads = tuple((int(low), int(high)) for low, high in padding)
    if len(pads) != 2 or min(min(pads)) < 0:
        raise ValueError(f"padding must be ((top, bottom), (left, right)), none of them negative, got {padding!r}.")
    windows = Windows(kernel, steps, pads, (height, width), channels)
    if min(windows.output_size) < 1:
        raise ValueError(
            f"a kernel of {kernel[0]} x {kernel[1]} does not fit into the {height} x {width} of x with padding {pads}."
        )

    def convolve(x: jax.Array, values: jax.Array, connections: Connections) -> jax.Array:
        images = x.reshape(-1, height, width, channels)
        y = product_with_probe(
            values,
            connections,
            lambda kernel: windows.dense_product(images, kernel.astype(x.dtype)),
            lambda values, connections: sparse_product(windows, values.astype(x.dtype), images, connections),
        )
        return y.reshape(*x.shape[:-3], *y.shape[1:])

    return with_automatic_axes(convolve, num_whole=2)(x, values, connections)


@dataclasses.dataclass(frozen=True)
class Windows(Columns):
    """[batch, height, width, channels]: a column is a position of the output in a sample."""

    kernel: tuple[int, int]
    strides: tuple[int, int]
    padding: tuple[tuple[int, int], ...]
    size: tuple[int, int]  # height and width of x
    channels: int

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of the output."""
        h, w = (
            (n + sum(pad) - k) // s + 1
            for n, pad, k, s in zip(self.size, self.padding, self.kernel, self.strides, strict=True)
        )
        return h, w

    @property
    def num_columns(self) -> int:
        """Positions of the output."""
        return math.prod(self.output_size)

    def dense_product(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """The convolution with a dense kernel [inputs, outputs]."""
        kernel = kernel.reshape(*self.kernel, self.channels, -1)
        dimensions = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, self.strides, self.padding, dimension_numbers=dimensions)

    def features_first(self, x: jax.Array) -> jax.Array:
        """[batch, height, width, channels] -> [channels, height, width, batch]."""
        return row_major(x.transpose(3, 1, 2, 0))

    def output_features_first(self, y: jax.Array) -> jax.Array:
        """[batch, height, width, outputs] -> [outputs, columns]."""
        return self.features_first(y).reshape(y.shape[-1], -1)

    def batch_first(self, y: jax.Array, num_samples: int) -> jax.Array:
        """[outputs, columns] -> [batch, height, width, outputs]."""
        return self.input_batch_first(y.reshape(-1, *self.output_size, num_samples), num_samples)

    def input_batch_first(self, x: jax.Array, num_samples: int) -> jax.Array:
        """[channels, height, width, batch] -> [batch, height, width, channels]."""
        return row_major(x).transpose(3, 1, 2, 0)

    def input_shape(self, connections: Connections, num_samples: int) -> tuple[int, ...]:
        """[channels, height, width, batch]."""
        return (self.channels, *self.size, num_samples)

    def looked_up(self, x: jax.Array, lookups: jax.Array | None) -> jax.Array:
        """[channels, height, width, batch] -> [*lookups, columns]: a window of a channel for each input."""
        x = jnp.pad(x, ((0, 0), *self.padding, (0, 0)))
        (h, w), (sh, sw) = self.output_size, self.strides
        span_h, span_w = (h - 1) * sh + 1, (w - 1) * sw + 1
        if lookups is None:
            offsets = [(i, j) for i in range(self.kernel[0]) for j in range(self.kernel[1])]
            windows = [x[:, i : i + span_h : sh, j : j + span_w : sw] for i, j in offsets]
            return jnp.concatenate(windows).reshape(len(offsets) * self.channels, -1)
        position, channel = lookups // self.channels, lookups % self.channels
        windows = jax.lax.gather(
            x,
            jnp.stack([channel, position // self.kernel[1], position % self.kernel[1]], axis=-1),
            jax.lax.GatherDimensionNumbers(
                offset_dims=tuple(range(lookups.ndim, lookups.ndim + 3)),
                collapsed_slice_dims=(0,),
                start_index_map=(0, 1, 2),
            ),
            slice_sizes=(1, span_h, span_w, x.shape[-1]),
            mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS,
        )
        return windows[..., ::sh, ::sw, :].reshape(*lookups.shape, -1)


def _pair(name: str, numbers: int | Sequence[int]) -> tuple[int, int]:
    pair: tuple[Any, ...] = tuple(numbers) if isinstance(numbers, tuple | list) else (numbers, numbers)
    if len(pair) != 2 or any(not isinstance(n, int) or n < 1 for n in pair):
        raise ValueError(f"{name} must be a whole number of at least 1, or two of them, got {numbers!r}.")
    return pair[0], pair[1]
