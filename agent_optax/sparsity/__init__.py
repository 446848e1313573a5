"""Sparse optimizers: which weights are active."""

from agent_optax.sparsity._distribution import erdos_renyi, erk, uniform
from agent_optax.sparsity._masks import active_masks, mask_params
from agent_optax.sparsity._rigl import rigl, rigl_itop
from agent_optax.sparsity._selection import top_k_mask
from agent_optax.sparsity._set import set_, set_itop
from agent_optax.sparsity._sparsify import sparsify
from agent_optax.sparsity._state import SparsifyState
from agent_optax.sparsity._static import static
from agent_optax.sparsity._where import kernels, named

__all__ = [
    "SparsifyState",
    "active_masks",
    "erdos_renyi",
    "erk",
    "kernels",
    "mask_params",
    "named",
    "rigl",
    "rigl_itop",
    "set_",
    "set_itop",
    "sparsify",
    "static",
    "top_k_mask",
    "uniform",
]
