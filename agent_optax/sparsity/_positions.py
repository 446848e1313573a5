"""The flat positions of the active weights of a mask, by counting bits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

# Of each byte, most significant bit first: where its r-th set bit stands.
_PLACES = np.zeros((256, 8), np.uint8)
for _byte in range(256):
    _set = [place for place in range(8) if _byte & (128 >> place)]
    _PLACES[_byte, : len(_set)] = _set


def positions(mask: jax.Array, count: int) -> jax.Array:
    """int32 [count]: the sorted flat positions of the `count` True of a mask.

    A cumulative sum over the weights would take several arrays of their size and most of the time of a topology
    update; here it runs over bytes of eight packed weights, and from there on over the positions asked for.
    """
    if count == 0:
        return jnp.zeros((0,), jnp.int32)
    packed = jnp.packbits(mask.reshape(-1))
    counts = jax.lax.population_count(packed).astype(jnp.int32)
    starts = jnp.cumsum(counts) - counts
    # The byte of the j-th position: one less than how many bytes start at or before it.
    starting = jnp.zeros((count,), jnp.int32).at[starts].add(1, mode="drop", indices_are_sorted=True)
    byte = jnp.cumsum(starting) - 1
    rank = jnp.arange(count, dtype=jnp.int32) - starts[byte]
    return 8 * byte + jnp.asarray(_PLACES)[packed[byte], rank]
