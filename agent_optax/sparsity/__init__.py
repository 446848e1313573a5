"""Sparse optimizers: which weights are active."""

from agent_optax.sparsity._axes import Axes
from agent_optax.sparsity._distribution import erdos_renyi, erk, uniform
from agent_optax.sparsity._masks import active_masks, mask_params
from agent_optax.sparsity._sparsify import sparsify
from agent_optax.sparsity._state import SparsifyState
from agent_optax.sparsity._where import kernels, named
from agent_optax.sparsity.patterns._blocks import blocks, output_channels
from agent_optax.sparsity.patterns._fan_in import fan_in
from agent_optax.sparsity.patterns._n_m import n_m
from agent_optax.sparsity.pruning._grasp import grasp
from agent_optax.sparsity.pruning._magnitude_masks import magnitude_masks
from agent_optax.sparsity.pruning._mask_overlap import mask_overlap
from agent_optax.sparsity.pruning._masks_of import masks_of
from agent_optax.sparsity.pruning._score_masks import score_masks
from agent_optax.sparsity.pruning._snip import snip
from agent_optax.sparsity.pruning._synflow import synflow
from agent_optax.sparsity.pruning._wanda import wanda
from agent_optax.sparsity.selection._top_k import top_k_mask
from agent_optax.sparsity.storages._sparse_update import SparseUpdate
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
    "Axes",
    "SparseUpdate",
    "SparsifyState",
    "ac_dc",
    "active_masks",
    "at_random",
    "bayesian_rewiring",
    "blocks",
    "drop_and_grow",
    "erdos_renyi",
    "erk",
    "fan_in",
    "fisher",
    "gradient_magnitude",
    "gradual_pruning",
    "grasp",
    "kernels",
    "magnitude_by_sign",
    "magnitude_masks",
    "mask_overlap",
    "mask_params",
    "masks_of",
    "momentum_magnitude",
    "movement",
    "n_m",
    "named",
    "never_active",
    "normalized",
    "output_channels",
    "rigl",
    "rigl_itop",
    "score_masks",
    "set_",
    "set_itop",
    "snfs",
    "snip",
    "sparsify",
    "static",
    "straight_through",
    "synflow",
    "taylor",
    "top_k_mask",
    "uniform",
    "wanda",
    "weight_magnitude",
]
