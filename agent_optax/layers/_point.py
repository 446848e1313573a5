"""The connections that stored parameters were stored with."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Places(NamedTuple):
    """Where the weights of some connections are among the values of others, in the shape of the values."""

    place: jax.Array  # int32: along the last axis; anything for weights that the others do not have
    is_there: jax.Array  # bool: whether the others have the weight

    def take(self, values: jax.Array, otherwise: jax.Array) -> jax.Array:
        """Values of the others, [..., *values_shape], at these weights; `otherwise` for those that they do not have."""
        taken = jnp.take_along_axis(values, jnp.broadcast_to(self.place, values.shape), axis=-1)
        return jnp.where(self.is_there, taken, otherwise)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["connections", "is_kept", "num_refreshes"],
    meta_fields=["parameter"],
)
@dataclasses.dataclass(frozen=True)
class Point:
    """What a layer was connected to when a point was stored, for connections that have changed since.

    Out of date once the point has been stored again, which its number of refreshes tells.
    """

    connections: Any  # Connections
    is_kept: jax.Array  # bool, the shape of the values: weights that have existed ever since
    num_refreshes: jax.Array  # int32 []: of the memory, when the connections changed
    parameter: str  # the name of the weights
