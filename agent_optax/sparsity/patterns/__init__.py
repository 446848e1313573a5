"""Patterns: which masks are allowed."""

from agent_optax.sparsity.patterns._blocks import blocks, output_channels
from agent_optax.sparsity.patterns._fan_in import fan_in
from agent_optax.sparsity.patterns._n_m import n_m

__all__ = ["blocks", "fan_in", "n_m", "output_channels"]
