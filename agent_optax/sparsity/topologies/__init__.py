"""Topologies: which weights are active, and the scores of which further ones are made."""

from agent_optax.sparsity.topologies._ac_dc import ac_dc
from agent_optax.sparsity.topologies._bayesian_rewiring import bayesian_rewiring
from agent_optax.sparsity.topologies._drop_and_grow import drop_and_grow
from agent_optax.sparsity.topologies._gradual_pruning import gradual_pruning
from agent_optax.sparsity.topologies._normalized import normalized
from agent_optax.sparsity.topologies._rigl import rigl, rigl_itop
from agent_optax.sparsity.topologies._running_scores import fisher, movement
from agent_optax.sparsity.topologies._scores import (
    at_random,
    gradient_magnitude,
    magnitude_by_sign,
    momentum_magnitude,
    never_active,
    taylor,
    weight_magnitude,
)
from agent_optax.sparsity.topologies._set import set_, set_itop
from agent_optax.sparsity.topologies._snfs import snfs
from agent_optax.sparsity.topologies._static import static
from agent_optax.sparsity.topologies._straight_through import straight_through

__all__ = [
    "ac_dc",
    "at_random",
    "bayesian_rewiring",
    "drop_and_grow",
    "fisher",
    "gradient_magnitude",
    "gradual_pruning",
    "magnitude_by_sign",
    "momentum_magnitude",
    "movement",
    "never_active",
    "normalized",
    "rigl",
    "rigl_itop",
    "set_",
    "set_itop",
    "snfs",
    "static",
    "straight_through",
    "taylor",
    "weight_magnitude",
]
