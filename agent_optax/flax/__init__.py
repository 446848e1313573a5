"""Training loops of Flax: `nnx` and `linen`. Needs ``pip install "agent-optax[flax]"``."""

try:
    import flax as _flax  # noqa: F401
except ImportError as error:
    raise ImportError(
        'agent_optax.flax needs Flax, which is not installed: pip install "agent-optax[flax]".'
    ) from error

from agent_optax.flax import linen, nnx

__all__ = ["linen", "nnx"]
