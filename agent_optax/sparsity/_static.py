"""The static topology: the masks of the start for ever."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from agent_optax.sparsity._topology import Layer


@dataclasses.dataclass(frozen=True)
class Static:
    """See `static`."""

    is_static = True
    interval = 1

    def is_due(self, step: jax.Array) -> jax.Array:
        """Never."""
        return jnp.zeros_like(step, dtype=bool)

    def rewire(self, layers: Sequence[Layer], step: jax.Array, key: jax.Array) -> list[jax.Array]:
        """Nothing changes."""
        del step, key
        return [layer.mask for layer in layers]


def static() -> Static:
    """The masks stay as they are: random ones at initialisation, or a lottery ticket given as ``masks=``.

    Returns:
        A topology for `agent_optax.sparsify`.

    Example:
        >>> import agent_optax, optax
        >>> tx = agent_optax.sparsify(optax.sgd(0.1), agent_optax.static(), sparsity=0.9)
    """
    return Static()
