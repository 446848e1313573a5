"""Training loops of Flax: `nnx` and `linen`. Needs ``pip install "agent-optax[flax]"``."""

from agent_optax.flax import linen, nnx

__all__ = ["linen", "nnx"]
