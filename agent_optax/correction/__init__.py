"""Corrected gradients: which old gradient, and how much of it."""

from agent_optax.correction._aliases import agent, alpha_svrg, storm, svrg
from agent_optax.correction._correct import correct_gradients
from agent_optax.correction._evaluate import value_and_grads
from agent_optax.correction._mars import mars, mars_correction
from agent_optax.correction._refresh import refresh, snapshot_params
from agent_optax.correction._state import CorrectGradientsState
from agent_optax.correction.coefficients._constant import constant
from agent_optax.correction.coefficients._gradient_regression import gradient_regression
from agent_optax.correction.coefficients._loss_regression import loss_regression
from agent_optax.correction.coefficients._scheduled import scheduled
from agent_optax.correction.memories._difference import difference
from agent_optax.correction.memories._history import history
from agent_optax.correction.memories._recursion import recursion
from agent_optax.correction.memories._snapshot import snapshot
from agent_optax.correction.memories._table import table

__all__ = [
    "CorrectGradientsState",
    "agent",
    "alpha_svrg",
    "constant",
    "correct_gradients",
    "difference",
    "gradient_regression",
    "history",
    "loss_regression",
    "mars",
    "mars_correction",
    "recursion",
    "refresh",
    "scheduled",
    "snapshot",
    "snapshot_params",
    "storm",
    "svrg",
    "table",
    "value_and_grads",
]
