"""Pruning layers to given numbers of active weights, by a score: each by itself, or all together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from agent_optax.sparsity._equal_layers import map_layers
from agent_optax.sparsity._layer import Layer
from agent_optax.sparsity.selection._top_k import num_true, select, select_from_all
from agent_optax.sparsity.topologies._scores import Score


def check_scope(scope: str) -> None:
    """Raises ValueError unless it is known."""
    if scope not in ("layer", "global"):
        raise ValueError(f"scope must be 'layer' or 'global', got {scope!r}.")


def check_score(score: Any) -> None:
    """Raises TypeError unless it can be called."""
    if not callable(score):
        raise TypeError(f"score must be a score such as agent_optax.weight_magnitude, got {score!r}.")


def scores_of(score: Score, layers: Sequence[Layer], key: jax.Array) -> list[jax.Array]:
    """By which weights are kept; where groups have to fill up, inactive ones come last."""
    keys = jax.random.split(key, max(len(layers), 1))[: len(layers)]
    scores = [score(layer, layer_key) for layer, layer_key in zip(layers, keys, strict=True)]
    return [
        s if layer.groups is None else jnp.where(layer.mask, s.astype(_real(s)), -jnp.inf)
        for s, layer in zip(scores, layers, strict=True)
    ]


def pruned_masks(
    layers: Sequence[Layer],
    scores: Sequence[jax.Array],
    numbers: jax.Array,
    final_active: jax.Array,
    is_last: jax.Array | bool,
    scope: str,
) -> list[jax.Array]:
    """The masks of the active weights of largest score: `numbers` [layers] of them, or their sum if scope is global.

    The best of each group are safe, and all that is left at last. At last a group that has too few left is filled up:
    regrowth may have taken some.
    """
    if not layers:
        return []
    safe = [
        score if layer.groups is None else jnp.where(layer.groups.best(score, number), jnp.inf, score)
        for layer, score, number in zip(layers, scores, final_active, strict=True)
    ]
    masks = _largest(layers, safe, numbers, scope)
    return [
        mask if layer.groups is None else jnp.where(is_last, layer.groups.best(score, number, layer.mask), mask)
        for mask, layer, score, number in zip(masks, layers, scores, final_active, strict=True)
    ]


def _largest(layers: Sequence[Layer], scores: Sequence[jax.Array], numbers: jax.Array, scope: str) -> list[jax.Array]:
    active = jnp.stack([num_true(layer.mask) for layer in layers])
    masks = [layer.mask for layer in layers]
    if scope == "global":
        return select_from_all(scores, jnp.minimum(jnp.sum(numbers), jnp.sum(active)), masks)

    def largest(kind: None, layer: tuple[jax.Array, jax.Array], number: jax.Array) -> tuple[jax.Array, tuple[()]]:
        del kind
        return select(layer[0], number, layer[1]), ()

    pairs = list(zip(scores, masks, strict=True))
    return map_layers(largest, [None] * len(pairs), pairs, jnp.minimum(numbers, active))[0]


def _real(scores: jax.Array) -> Any:
    return scores.dtype if jnp.issubdtype(scores.dtype, jnp.floating) else jnp.float32
