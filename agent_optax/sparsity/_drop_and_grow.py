"""Topologies that replace a part of the active weights: drop some, grow as many."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from agent_optax.sparsity._selection import random_scores, select
from agent_optax.sparsity._topology import Layer, UpdateTimes, fraction_at, num_dropped

Score = Callable[[Layer, jax.Array], jax.Array]  # (layer, key) -> scores of the layer's shape


def weight_magnitude(layer: Layer, key: jax.Array) -> jax.Array:
    """|w|."""
    del key
    return jnp.abs(layer.weights)


def gradient_magnitude(layer: Layer, key: jax.Array) -> jax.Array:
    """|g|."""
    del key
    return jnp.abs(layer.grads)


def at_random(layer: Layer, key: jax.Array) -> jax.Array:
    """A uniform random number for each position."""
    return random_scores(key, layer.weights)


@dataclasses.dataclass(frozen=True)
class DropAndGrow:
    """Drops the active weights of least `drop` score, grows as many inactive ones of largest `grow` score."""

    times: UpdateTimes
    drop_fraction: optax.ScalarOrSchedule
    drop: Score
    grow: Score
    is_static = False

    @property
    def interval(self) -> int:
        """Steps between topology updates."""
        return self.times.every

    def is_due(self, step: jax.Array) -> jax.Array:
        """At start, start + update_every, ... below stop."""
        return self.times.include(step)

    def rewire(self, layers: Sequence[Layer], step: jax.Array, key: jax.Array) -> list[jax.Array]:
        """Layer by layer; the number of active weights of a layer never changes."""
        fraction = fraction_at(self.drop_fraction, step)
        keys = jax.random.split(key, max(len(layers), 1))
        return [self._rewire_layer(layer, fraction, keys[i]) for i, layer in enumerate(layers)]

    def _rewire_layer(self, layer: Layer, fraction: jax.Array, key: jax.Array) -> jax.Array:
        drop_key, grow_key = jax.random.split(key)
        num_active = jnp.sum(layer.mask, dtype=jnp.int32)
        n = num_dropped(fraction, num_active)
        kept = select(self.drop(layer, drop_key), num_active - n, candidates=layer.mask)
        # Weights dropped just now are candidates for growth: grown again, they keep their value.
        return kept | select(self.grow(layer, grow_key), n, candidates=~kept)
