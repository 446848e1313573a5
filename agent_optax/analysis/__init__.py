"""Measurements at a point of training: how gradients scatter, what a correction is worth, what sparsity saves.

Those over batches take `batches` with a leading axis, run one `jax.lax.scan` over it and keep no gradient, so that they
fit wherever a training step does:

    old_params = agent_optax.snapshot_params(opt_state, params)
    measured = jax.jit(functools.partial(optimal_coefficient, loss_fn))(params, old_params, batches)
    print(sparsity_summary(params, opt_state, apply_fn=apply_fn, example_inputs=[image[None]]))
"""

from agent_optax.analysis._estimator_error import EstimatorError, estimator_error
from agent_optax.analysis._forward_flops import ForwardFlops, forward_flops
from agent_optax.analysis._gradient_correlation import GradientCorrelation, gradient_correlation
from agent_optax.analysis._gradient_norms import GradientNorms, gradient_norms
from agent_optax.analysis._optimal_coefficient import OptimalCoefficient, optimal_coefficient
from agent_optax.analysis._perturb import perturb
from agent_optax.analysis._sparsity_summary import LayerSummary, SparsitySummary, sparsity_summary
from agent_optax.analysis._variance_ratio import variance_ratio

__all__ = [
    # gradients at two points
    "perturb",
    "gradient_correlation",
    "GradientCorrelation",
    # what a correction is worth
    "optimal_coefficient",
    "OptimalCoefficient",
    "variance_ratio",
    "estimator_error",
    "EstimatorError",
    # gradients at one point
    "gradient_norms",
    "GradientNorms",
    # what sparsity is and saves
    "sparsity_summary",
    "SparsitySummary",
    "LayerSummary",
    "forward_flops",
    "ForwardFlops",
]
