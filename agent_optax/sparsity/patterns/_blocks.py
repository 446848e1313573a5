"""Block sparsity: weights that become active and inactive together."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from agent_optax._tree import wide_dtype
from agent_optax.sparsity._layer import Layer
from agent_optax.sparsity._pattern import Pattern
from agent_optax.sparsity.patterns._columns import Columns
from agent_optax.sparsity.selection._tiles import join_axes, split_axis, whole_axis
from agent_optax.sparsity.selection._top_k import random_scores, select

Reduce = Callable[[jax.Array, tuple[int, ...]], jax.Array]
WHOLE = -1
MAX_AXES = 32  # of an array


def root_mean_square(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """sqrt(mean(x^2))."""
    wide = x.astype(wide_dtype(x.dtype))
    return jnp.sqrt(jnp.mean(jnp.square(wide), axes))


def mean(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The mean, whatever the signs."""
    return jnp.mean(x, axes)


BY_SIZE: dict[Reduce, float] = {root_mean_square: 0.5, mean: 1.0}  # the power of the block's size by which each divides


def blocks(
    shape: tuple[int, ...],
    reduce_weights: Reduce = root_mean_square,
    reduce_grads: Reduce = root_mean_square,
    *,
    balanced: bool = False,
) -> Blocks:
    r"""Block sparsity, for ``sparsify(..., pattern=)``: whole blocks of a leaf are active or inactive.

    Any topology sees one weight and one gradient a block, and works on them as it would on single entries:

    .. math::
        w_b = \sqrt{\tfrac1{|b|} \sum_{i \in b} w_i^2}, \qquad g_b = \sqrt{\tfrac1{|b|} \sum_{i \in b} g_i^2}

    Args:
        shape: of a block, counted from the last axis of a layer, ``[*spatial, inputs, outputs]`` (see `Axes`):
            ``(4, 4)`` are tiles of 4 inputs and 4 outputs, ``(-1, -1, 1, 1)`` the spatial filters of a convolution; -1
            is the whole axis. Further leading axes of a layer are not grouped; a layer with fewer axes uses the last.
            Where a block does not divide an axis, those at its end are smaller.
        reduce_weights: a function of (array, axes) that takes the weights of a block to one; it sees zeros where a
            block at the end has no weights. Default: the root of the mean square, over the weights that there are.
        reduce_grads: the same for gradients and their moving average.
        balanced: whether each column of blocks, which feeds the same outputs, has the same number of active ones, at
            least one. Default False.

    Returns:
        A pattern for `agent_optax.sparsify`. A layer gets round(density * number of blocks) active blocks; balanced,
        round(density * number of rows) in each column.

    Raises:
        ValueError: if a number is neither positive nor -1; from ``init``, with ``storage="compact"``, if the number of
            active weights depends on which blocks are active, because some are smaller.

    Example:
        >>> import agent_optax, jax.numpy as jnp, optax
        >>> pattern = agent_optax.blocks((2, 2))
        >>> tx = agent_optax.sparsify(optax.sgd(0.1), agent_optax.set_(), sparsity=0.75, pattern=pattern)
        >>> params = jnp.ones((4, 4))
        >>> agent_optax.mask_params(params, tx.init(params)).reshape(2, 2, 2, 2).sum((1, 3)).max().item()
        4.0

    References:
        Gray, Radford and Kingma, GPU Kernels for Block-Sparse Weights, 2017.
    """
    if not isinstance(shape, tuple) or not shape or not all(isinstance(n, numbers.Integral) for n in shape):
        raise ValueError(f"shape must be a tuple of whole numbers such as (4, 4), got {shape!r}.")
    if not all(n == WHOLE or n >= 1 for n in shape):
        raise ValueError(f"shape must hold positive numbers, or -1 for a whole axis, got {shape!r}.")
    return Blocks(shape, reduce_weights, reduce_grads, balanced)


def output_channels() -> Blocks:
    """Channel sparsity, for ``sparsify(..., pattern=)``: whole output channels are active or inactive.

    A channel is everything that feeds one output of a layer (see `Axes`): in Flax's layout a slice of the last axis of
    a kernel. It is `blocks` in which every axis of a layer but the last is whole.

    Returns:
        A pattern for `agent_optax.sparsify`.

    Example:
        >>> import agent_optax, jax.numpy as jnp, optax
        >>> tx = agent_optax.sparsify(
        ...     optax.sgd(0.1), agent_optax.rigl(), sparsity=0.5, pattern=agent_optax.output_channels()
        ... )
        >>> params = jnp.ones((3, 3, 8, 4))
        >>> sorted(agent_optax.mask_params(params, tx.init(params)).sum((0, 1, 2)).tolist())
        [0.0, 0.0, 72.0, 72.0]
    """
    return Blocks((WHOLE,) * (MAX_AXES - 1) + (1,))


@dataclasses.dataclass(frozen=True)
class Blocks(Pattern):
    """See `blocks`."""

    shape: tuple[int, ...]
    reduce_weights: Reduce = root_mean_square
    reduce_grads: Reduce = root_mean_square
    balanced: bool = False
    ablation: float | None = None
    has_blocks = True

    @property
    def has_groups(self) -> bool:
        """Whether each column keeps its number."""
        return self.balanced

    @property
    def keeps_counts(self) -> bool:
        """What an ablated column had is shared among the others, to the nearest whole number."""
        return self.ablation is None

    def block(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a block in a layer of this shape."""
        padded = (1,) * (len(shape) - len(self.shape)) + self.shape[-len(shape) :]
        return tuple(n if b == WHOLE else b for n, b in zip(shape, padded, strict=True))

    def grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """How many blocks lie along each axis."""
        return tuple(-(-n // b) for n, b in zip(shape, self.block(shape), strict=True))

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Balanced blocks need inputs and outputs."""
        if self.balanced and len(shape) < 2:
            raise ValueError(
                f"pattern={self} needs layers with inputs and outputs, but {name} has the shape {tuple(shape)}: leave "
                "it out with where=, or give patterns leaf by leaf with a callable on the path."
            )

    def unit_size(self, shape: tuple[int, ...]) -> int:
        """Entries of a block that is not at the end of an axis."""
        return math.prod(self.block(shape))

    def num_units(self, shape: tuple[int, ...]) -> int:
        """Blocks of a layer."""
        return math.prod(self.grid(shape))

    def step(self, shape: tuple[int, ...]) -> int:
        """A block, or one for each column."""
        return self.grid(shape)[-1] if self.balanced else 1

    def count(self, shape: tuple[int, ...], density: float) -> int:
        """Active blocks; balanced, at least one in each column."""
        step = self.step(shape)
        number = round(density * (self.num_units(shape) // step))
        return max(number, int(self.balanced)) * step

    def num_entries(self, shape: tuple[int, ...], number: int) -> int | None:
        """Blocks of which some are smaller hold the same number in each column, if those are the last columns."""
        *is_padded, _ = [n % b > 0 for n, b in zip(shape, self.block(shape), strict=True)]
        if not shape[-1] % self.block(shape)[-1] and not any(is_padded):
            return number * self.unit_size(shape)
        if not self.balanced or any(is_padded):
            return None
        *inputs, _ = self.block(shape)
        return number // self.grid(shape)[-1] * math.prod(inputs) * shape[-1]

    def random_mask(self, number: int, like: jax.Array, key: jax.Array) -> jax.Array:
        """That many random blocks."""
        scores = random_scores(key, self._tiled(jnp.zeros_like(like, dtype=bool)).any(self._axes(like.ndim)))
        if not self.balanced:
            return self.entries(select(scores, number), like)
        return self.entries(Columns().best(scores, number), like)

    def allows(self, mask: jax.Array) -> jax.Array:
        """Whether each block is all active or all inactive, and columns hold the same number."""
        blocks = self._tiled(mask).any(self._axes(mask.ndim))
        is_whole = jnp.all(self.entries(blocks, mask) == mask)
        return is_whole & Columns(self.ablation).hold(blocks) if self.balanced else is_whole

    def units(self, layer: Layer) -> Layer:
        """One weight, gradient and bit a block."""
        shape = layer.mask.shape
        fixed = self.num_entries(shape, self.num_units(shape))
        layer = layer._replace(
            groups=Columns(self.ablation) if self.balanced else None,
            count=None if layer.count is None or fixed is None else layer.count * self.num_units(shape) // fixed,
        )
        if self.unit_size(shape) == 1:
            return layer
        return layer._replace(
            weights=self._pooled(self.reduce_weights, layer.weights),
            mask=self._pooled(jnp.any, layer.mask),
            grads=self._pooled(self.reduce_grads, layer.grads),
            ever_active=self._pooled(jnp.any, layer.ever_active),
            momentum=self._pooled(self.reduce_grads, layer.momentum),
            statistic=self._pooled(mean, layer.statistic),
        )

    def entries(self, mask: jax.Array, like: jax.Array) -> jax.Array:
        """Each entry as its block."""
        tiled = self._tiled(jnp.zeros_like(like, dtype=bool)) | jnp.expand_dims(mask, self._axes(like.ndim))
        if all(n % b == 0 for n, b in zip(like.shape, self.block(like.shape), strict=True)):
            return join_axes(tiled, like)
        whole = tiled.reshape([n * b for n, b in zip(mask.shape, self.block(like.shape), strict=True)])
        return whole[tuple(slice(n) for n in like.shape)]

    def _pooled(self, reduce: Reduce, x: Any) -> Any:
        if x is None:
            return None
        axes = self._axes(x.ndim)
        pooled = reduce(self._tiled(x), axes)
        if reduce not in BY_SIZE:
            return pooled
        for axis, (n, b) in enumerate(zip(x.shape, self.block(x.shape), strict=True)):
            if n % b:  # the mean at the end of the axis is over n % b of b
                factors = np.where(np.arange(pooled.shape[axis]) < n // b, 1, (b / (n % b)) ** BY_SIZE[reduce])
                shape = [-1 if i == axis else 1 for i in range(x.ndim)]
                pooled = pooled * jnp.asarray(factors.reshape(shape), pooled.dtype)
        return pooled

    def _tiled(self, x: jax.Array) -> jax.Array:
        """[n0/b0, b0, n1/b1, b1, ...], with zeros where blocks at the end are smaller."""
        for axis, b in reversed(list(enumerate(self.block(x.shape)))):
            if x.shape[axis] % b:
                widths = [(0, -n % b if i == axis else 0) for i, n in enumerate(x.shape)]
                x = jnp.pad(whole_axis(x, axis), widths)
            x = split_axis(x, axis, b)
        return x

    @staticmethod
    def _axes(ndim: int) -> tuple[int, ...]:
        return tuple(range(1, 2 * ndim, 2))
