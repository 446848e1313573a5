"""Block sparsity: weights that become active and inactive together."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable

import jax
import jax.numpy as jnp

from agent_optax._tree import wide_dtype
from agent_optax.sparsity._layer import Layer
from agent_optax.sparsity._pattern import Pattern
from agent_optax.sparsity.selection._tiles import join_axes, split_axis
from agent_optax.sparsity.selection._top_k import random_scores, select

Reduce = Callable[[jax.Array, tuple[int, ...]], jax.Array]
WHOLE = -1
MAX_AXES = 32  # of an array


def root_mean_square(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """sqrt(mean(x^2))."""
    wide = x.astype(wide_dtype(x.dtype))
    return jnp.sqrt(jnp.mean(jnp.square(wide), axes))


def blocks(
    shape: tuple[int, ...], reduce_weights: Reduce = root_mean_square, reduce_grads: Reduce = root_mean_square
) -> Blocks:
    r"""Block sparsity, for ``sparsify(..., pattern=)``: whole blocks of a leaf are active or inactive.

    Any topology sees one weight and one gradient a block, and works on them as it would on single entries:

    .. math::
        w_b = \sqrt{\tfrac1{|b|} \sum_{i \in b} w_i^2}, \qquad g_b = \sqrt{\tfrac1{|b|} \sum_{i \in b} g_i^2}

    Args:
        shape: of a block, counted from the last axis: ``(4, 4)`` are tiles of 4 inputs and 4 outputs of a kernel in
            Flax's layout, ``(-1, -1, 1, 1)`` the spatial filters of a convolution; -1 is the whole axis. Further
            leading axes of a leaf are not grouped; a leaf with fewer axes uses the last. Each must divide its axis.
        reduce_weights: a function of (array, axes) that takes the weights of a block to one. Default: the root of the
            mean square.
        reduce_grads: the same for gradients and their moving average.

    Returns:
        A pattern for `agent_optax.sparsify`. A leaf gets round(density * number of blocks) active blocks.

    Raises:
        ValueError: if a number is neither positive nor -1; from ``init``, if a block does not divide a leaf.

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
    return Blocks(shape, reduce_weights, reduce_grads)


def output_channels() -> Blocks:
    """Channel sparsity, for ``sparsify(..., pattern=)``: whole output channels are active or inactive.

    A channel is everything that feeds one output: a slice of the last axis of a kernel in Flax's layout. It is
    `blocks` in which every axis but the last is whole.

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
    has_blocks = True

    def block(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a block in a leaf of this shape."""
        padded = (1,) * (len(shape) - len(self.shape)) + self.shape[-len(shape) :]
        return tuple(n if b == WHOLE else b for n, b in zip(shape, padded, strict=True))

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Blocks tile the leaf."""
        block = self.block(shape)
        if any(n % b for n, b in zip(shape, block, strict=True)):
            raise ValueError(
                f"pattern=blocks({self.shape}) does not tile {name} of shape {tuple(shape)}: each number must divide "
                "its axis. Leave the leaf out with where=, or give patterns leaf by leaf with a callable on the path."
            )

    def unit_size(self, shape: tuple[int, ...]) -> int:
        """Entries of a block."""
        return math.prod(self.block(shape))

    def random_mask(self, count: int, like: jax.Array, key: jax.Array) -> jax.Array:
        """That many entries in random blocks."""
        grid = self._tiled(jnp.zeros_like(like, dtype=bool)).any(self._axes(like.ndim))
        return self.entries(select(random_scores(key, grid), count // self.unit_size(like.shape)), like)

    def allows(self, mask: jax.Array) -> jax.Array:
        """Whether each block is all active or all inactive."""
        tiled, axes = self._tiled(mask), self._axes(mask.ndim)
        return jnp.all(tiled.any(axes) == tiled.all(axes))

    def units(self, layer: Layer) -> Layer:
        """One weight, gradient and bit a block."""
        axes = self._axes(layer.mask.ndim)
        pool = lambda reduce, x: None if x is None else reduce(self._tiled(x), axes)  # noqa: E731
        return layer._replace(
            weights=pool(self.reduce_weights, layer.weights),
            mask=pool(jnp.any, layer.mask),
            grads=pool(self.reduce_grads, layer.grads),
            ever_active=pool(jnp.any, layer.ever_active),
            momentum=pool(self.reduce_grads, layer.momentum),
            count=None if layer.count is None else layer.count // self.unit_size(layer.mask.shape),
        )

    def entries(self, mask: jax.Array, like: jax.Array) -> jax.Array:
        """Each entry as its block."""
        tiled = self._tiled(jnp.zeros_like(like, dtype=bool))
        return join_axes(tiled | jnp.expand_dims(mask, self._axes(like.ndim)), like)

    def _tiled(self, x: jax.Array) -> jax.Array:
        """[n0/b0, b0, n1/b1, b1, ...]."""
        for axis, b in reversed(list(enumerate(self.block(x.shape)))):
            x = split_axis(x, axis, b)
        return x

    @staticmethod
    def _axes(ndim: int) -> tuple[int, ...]:
        return tuple(range(1, 2 * ndim, 2))
