"""Topologies: which weights are active; the same names as in `agent_optax`."""

from agent_optax.sparsity.topologies import (
    at_random,
    bayesian_rewiring,
    drop_and_grow,
    gradient_magnitude,
    gradual_pruning,
    magnitude_by_sign,
    momentum_magnitude,
    never_active,
    rigl,
    rigl_itop,
    set_,
    set_itop,
    snfs,
    static,
    taylor,
    weight_magnitude,
)

__all__ = [
    "at_random",
    "bayesian_rewiring",
    "drop_and_grow",
    "gradient_magnitude",
    "gradual_pruning",
    "magnitude_by_sign",
    "momentum_magnitude",
    "never_active",
    "rigl",
    "rigl_itop",
    "set_",
    "set_itop",
    "snfs",
    "static",
    "taylor",
    "weight_magnitude",
]
