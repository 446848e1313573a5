"""Layers of equal shape are updated by one loop, so that programs do not grow with the depth of a network."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

FEWEST_IN_A_LOOP = 4  # a loop keeps a copy of a layer and of all outputs: a few layers take less memory without


def map_layers(
    function: Callable[..., tuple[Any, Any]], kinds: Sequence[Hashable], layers: Sequence[Any], *rows: jax.Array
) -> tuple[list[Any], Any]:
    """Calls ``function(kind, layer, *(r[i] for r in rows)) -> (output, counts)`` for the i-th kind and layer.

    Layers of equal kind, whose trees and types of arrays are equal, share a loop.

    Args:
        function: called with a kind, a layer and a row of each array in `rows`.
        kinds: what is static about each layer.
        layers: a tree of arrays for each layer.
        rows: arrays with a leading axis of layers.

    Returns:
        The outputs, and the sums of the counts over all layers; None for no layers.
    """
    groups: dict[Any, list[int]] = {}
    for i, (kind, layer) in enumerate(zip(kinds, layers, strict=True)):
        leaves, treedef = jax.tree.flatten(layer)
        groups.setdefault((kind, treedef, tuple(map(jax.typeof, leaves))), []).append(i)
    results: list[Any] = [None] * len(layers)
    totals = None
    for (kind, *_), members in groups.items():
        own_rows = [r if len(members) == len(layers) else r[np.asarray(members)] for r in rows]
        outputs, counts = _map_equal(functools.partial(function, kind), [layers[i] for i in members], own_rows)
        totals = counts if totals is None else jax.tree.map(jnp.add, totals, counts)
        for i, output in zip(members, outputs, strict=True):
            results[i] = output
    return results, totals


def in_one_program(function: Callable[..., Any], static: Any, arrays: Sequence[jax.Array], *others: Any) -> Any:
    """``function(static, arrays, *others)``, compiled as a whole: outside `jax.jit` each operation would be by itself.

    Not where known arrays lie on several devices: a program of its own lays its outputs out as it likes, and single
    operations as their operands are.
    """
    is_spread = any(not isinstance(x, Tracer) and len(x.sharding.device_set) > 1 for x in map(jnp.asarray, arrays))
    run = function if is_spread else jax.jit(function, static_argnums=0, inline=True)
    return run(static, arrays, *others)


def _map_equal(function: Callable[..., Any], layers: Sequence[Any], rows: Sequence[jax.Array]) -> tuple[list[Any], Any]:
    """One iteration a layer, which picks its arrays: stacking them would copy those of all layers at once."""
    if len(layers) < FEWEST_IN_A_LOOP:
        outputs, counts = zip(*(function(layer, *(r[i] for r in rows)) for i, layer in enumerate(layers)), strict=True)
        return list(outputs), jax.tree.map(lambda *c: functools.reduce(jnp.add, c), *counts)
    picks = [functools.partial(lambda layer: layer, layer) for layer in layers]
    numbers = jnp.arange(len(layers), dtype=jnp.int32)
    outputs, counts = jax.lax.map(lambda xs: function(jax.lax.switch(xs[0], picks), *xs[1:]), (numbers, *rows))
    totals = jax.tree.map(lambda c: jnp.sum(c, axis=0, dtype=c.dtype), counts)
    if not jax.tree.leaves(outputs):
        return [outputs] * len(layers), totals
    return [jax.tree.map(functools.partial(_row, i), outputs) for i in _indices(len(layers), outputs)], totals


def _row(index: jax.Array, stacked: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stacked, index, axis=0, keepdims=False)


def _indices(number: int, stacked: Any) -> list[jax.Array]:
    """0, 1, ..., but not as constants: XLA compiles one slice at a variable index, and not one at each constant.

    Both branches are the same; the predicate only keeps XLA from knowing the numbers.
    """

    def numbers() -> list[jax.Array]:
        return [jnp.asarray(i, jnp.int32) for i in range(number)]

    smallest = min(jax.tree.leaves(stacked), key=lambda leaf: leaf.size)
    if not smallest.size:
        return numbers()
    return jax.lax.cond(jnp.any(_row(jnp.asarray(0), smallest) != 0), numbers, numbers)
