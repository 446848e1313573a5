"""Layers of equal shape are updated by one loop, so that programs do not grow with the depth of a network."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def map_layers(function: Callable[[Any, Any], Any], kinds: Sequence[Hashable], layers: Sequence[Any]) -> list[Any]:
    """``[function(kind, layer), ...]``; those of equal kind, whose trees and types of arrays are equal, in one loop."""
    groups: dict[Any, list[int]] = {}
    for i, (kind, layer) in enumerate(zip(kinds, layers, strict=True)):
        leaves, treedef = jax.tree.flatten(layer)
        groups.setdefault((kind, treedef, tuple(map(jax.typeof, leaves))), []).append(i)
    results: list[Any] = [None] * len(layers)
    for (kind, *_), members in groups.items():
        outputs = _map_equal(functools.partial(function, kind), [layers[i] for i in members])
        for i, output in zip(members, outputs, strict=True):
            results[i] = output
    return results


def _map_equal(function: Callable[[Any], Any], layers: Sequence[Any]) -> list[Any]:
    """One iteration a layer, which picks its arrays: stacking them would copy those of all layers at once."""
    if len(layers) == 1:
        return [function(layers[0])]
    picks = [functools.partial(lambda layer: layer, layer) for layer in layers]
    stacked = jax.lax.map(lambda i: function(jax.lax.switch(i, picks)), jnp.arange(len(layers), dtype=jnp.int32))
    return [jax.tree.map(functools.partial(_row, i), stacked) for i in _indices(len(layers), stacked)]


def _row(index: jax.Array, stacked: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stacked, index, axis=0, keepdims=False)


def _indices(number: int, stacked: Any) -> list[jax.Array]:
    """0, 1, ..., but not as constants: XLA compiles one slice at a variable index, and not one at each constant.

    Both branches are the same; the predicate only keeps XLA from knowing.
    """
    indices = [jnp.asarray(i, jnp.int32) for i in range(number)]
    smallest = min(jax.tree.leaves(stacked), key=lambda leaf: leaf.size)
    if not smallest.size:
        return indices
    return jax.lax.cond(smallest[(0,) * smallest.ndim] != 0, lambda: indices, lambda: indices)
