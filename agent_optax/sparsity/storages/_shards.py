"""A leaf as rows, one for each part of it that lies on a device of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax

from agent_optax.sparsity.selection._tiles import explicit_parts, join_axes, reshape_after, split_axis

Parts = tuple[int, ...]  # into how many parts each axis is split; () for a leaf that is one row


def parts_of(x: jax.Array) -> Parts:
    """The parts that the type of an array tells: automatic sharding keeps them from a program."""
    parts = explicit_parts(x)
    return parts if math.prod(parts) > 1 else ()


def as_rows(x: jax.Array, parts: Parts) -> jax.Array:
    """[*parts, entries of a part]: each row stays on the device of its part."""
    if not parts:
        return x.reshape(-1)
    entries = x.size // math.prod(parts)
    for axis in reversed(range(x.ndim)):
        x = split_axis(x, axis, x.shape[axis] // parts[axis])
    return reshape_after(x.transpose(*range(0, x.ndim, 2), *range(1, x.ndim, 2)), len(parts), (entries,))


def from_rows(rows: jax.Array, like: jax.Array) -> jax.Array:
    """What `as_rows` made of an array shaped and laid out as `like`, whole again."""
    parts = rows.shape[:-1]
    if not parts:
        return rows.reshape(like.shape)
    tiles = reshape_after(rows, len(parts), tuple(n // p for n, p in zip(like.shape, parts, strict=True)))
    return join_axes(tiles.transpose(*(axis for i in range(len(parts)) for axis in (i, len(parts) + i))), like)


def row_by_row(function: Callable[..., Any], parts: Parts) -> Callable[..., Any]:
    """`function` of single rows, applied to all of them."""
    for _ in parts:
        function = jax.vmap(function)
    return function
