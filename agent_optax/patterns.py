"""Patterns: which masks are allowed; the same names as in `agent_optax`."""

from agent_optax.sparsity.patterns import blocks, fan_in, n_m, output_channels

__all__ = ["blocks", "fan_in", "n_m", "output_channels"]
