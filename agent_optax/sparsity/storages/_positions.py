"""The flat positions of the active weights of a mask, by counting bits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from agent_optax.sparsity.selection._top_k import num_true


def positions(packed: jax.Array, capacity: int) -> jax.Array:
    """int32 [capacity]: the sorted positions of the set bits of bytes, most significant bit first; then padding.

    A cumulative sum over single weights would take several arrays of their size and most of the time of a topology
    update; here it runs over bytes of eight, and after that over the requested positions.
    """
    place = jnp.arange(capacity, dtype=jnp.int32)
    if not capacity or not packed.size:
        return _padding(capacity) + place
    ends = jnp.cumsum(_num_set(packed))
    starts = ends - _num_set(packed)
    # The byte of the j-th position: one less than how many bytes start at or before it.
    zeros = place * starts[:1]  # on the device of this row
    starting = zeros.at[starts].add(1, mode="drop", indices_are_sorted=True)
    byte = jnp.cumsum(starting) - 1
    rank, bits = place - starts[byte], packed[byte]
    # Where in its byte: as many places as there are leading bits with at most `rank` set.
    bit = sum((_num_set(bits >> (7 - i)) <= rank).astype(jnp.int32) for i in range(8))
    return jnp.where(place < ends[-1], 8 * byte + bit, _padding(capacity) + place)


def places(packed: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where among the set bits these positions stand, int32, and whether they are set; padding never is."""
    if not positions.size or not packed.size:
        return jnp.zeros_like(positions), jnp.zeros_like(positions, dtype=bool)
    starts = jnp.cumsum(_num_set(packed)) - _num_set(packed)
    is_inside = positions < 8 * packed.shape[-1]
    byte = jnp.where(is_inside, positions // 8, 0)
    bit = positions % 8
    bits = packed[byte].astype(jnp.int32)
    before = bits & (0xFF00 >> bit)
    place = starts[byte] + jax.lax.population_count(before)
    return jnp.minimum(place, positions.shape[-1] - 1), is_inside & ((bits >> (7 - bit)) & 1 == 1)


def num_positions(indices: jax.Array) -> jax.Array:
    """int32: how many are not padding."""
    return num_true(indices < _padding(indices.shape[-1]))


def _padding(capacity: int) -> int:
    """The least padding of so many positions: distinct numbers beyond all positions, in order."""
    return np.iinfo(np.int32).max - capacity


def _num_set(packed: jax.Array) -> jax.Array:
    return jax.lax.population_count(packed).astype(jnp.int32)
