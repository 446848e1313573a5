"""The static topology: the initial masks never change."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from agent_optax.sparsity._topology import Topology


@dataclasses.dataclass(frozen=True)
class Static(Topology):
    """See `static`."""

    is_static = True

    @property
    def interval(self) -> int:
        """Nothing to spread."""
        return 1

    def is_due(self, step: jax.Array) -> jax.Array:
        """Never."""
        return jnp.zeros_like(step, dtype=bool)


def static() -> Static:
    """The masks stay as they are: random ones at initialisation, or a lottery ticket given as ``masks=``.

    Returns:
        A topology for `agent_optax.sparsify`.

    Example:
        >>> import agent_optax, optax
        >>> tx = agent_optax.sparsify(optax.sgd(0.1), agent_optax.static(), sparsity=0.9)
    """
    return Static()
