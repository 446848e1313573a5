"""Training sparse neural networks with adaptively corrected gradients, in JAX and Optax."""

from agent_optax import adversarial as adversarial
from agent_optax import analysis as analysis
from agent_optax._diagnostics import diagnostics
from agent_optax.correction import (
    CorrectGradientsState,
    agent,
    alpha_svrg,
    constant,
    correct_gradients,
    difference,
    gradient_regression,
    history,
    loss_regression,
    mars,
    mars_correction,
    recursion,
    refresh,
    scheduled,
    snapshot,
    snapshot_params,
    storm,
    svrg,
    table,
    value_and_grads,
)
from agent_optax.sparsity import (
    SparsifyState,
    active_masks,
    erdos_renyi,
    erk,
    kernels,
    mask_params,
    named,
    rigl,
    rigl_itop,
    set_,
    set_itop,
    sparsify,
    static,
    top_k_mask,
    uniform,
)

__version__ = "0.1.0"

__all__ = [
    # Correction: which old gradient, and how much of it.
    "correct_gradients",
    "agent",
    "svrg",
    "alpha_svrg",
    "storm",
    "mars",
    "mars_correction",
    "snapshot",
    "recursion",
    "table",
    "history",
    "difference",
    "loss_regression",
    "gradient_regression",
    "constant",
    "scheduled",
    "value_and_grads",
    "refresh",
    "snapshot_params",
    # Sparsity: which weights are active.
    "sparsify",
    "static",
    "set_",
    "rigl",
    "set_itop",
    "rigl_itop",
    "uniform",
    "erdos_renyi",
    "erk",
    "kernels",
    "named",
    "top_k_mask",
    "mask_params",
    "active_masks",
    # Both.
    "diagnostics",
    "CorrectGradientsState",
    "SparsifyState",
]
