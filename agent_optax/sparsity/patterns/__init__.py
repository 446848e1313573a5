"""Patterns: which masks are allowed."""

from agent_optax.sparsity.patterns._blocks import blocks, output_channels
from agent_optax.sparsity.patterns._n_m import n_m

__all__ = ["blocks", "n_m", "output_channels"]
