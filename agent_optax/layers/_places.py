"""Where weights are among those of other connections."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from agent_optax.sparsity.selection._tiles import laid_out_as, whole


class Places(NamedTuple):
    """Where the weights of some connections are among the values of others, in the shape of the values."""

    place: jax.Array  # int32: along the last axis; anything for weights that the others do not have
    is_there: jax.Array  # bool: whether the others have the weight

    def take(self, values: jax.Array, otherwise: jax.Array) -> jax.Array:
        """Values of the others, [..., *values_shape], at these weights; `otherwise` for those that they do not have."""
        taken = jnp.take_along_axis(whole(values), jnp.broadcast_to(self.place, values.shape), axis=-1)
        return laid_out_as(jnp.where(self.is_there, taken, whole(otherwise)), like=values)
