"""Corrected gradients: which old gradient, and how much of it."""

from agent_optax.correction._aliases import agent, svrg
from agent_optax.correction._coefficient import constant
from agent_optax.correction._correct import correct_gradients
from agent_optax.correction._evaluate import value_and_grads
from agent_optax.correction._gradient_regression import gradient_regression
from agent_optax.correction._history import history
from agent_optax.correction._loss_regression import loss_regression
from agent_optax.correction._refresh import refresh, snapshot_params
from agent_optax.correction._snapshot import snapshot
from agent_optax.correction._state import CorrectGradientsState

__all__ = [
    "CorrectGradientsState",
    "agent",
    "constant",
    "correct_gradients",
    "gradient_regression",
    "history",
    "loss_regression",
    "refresh",
    "snapshot",
    "snapshot_params",
    "svrg",
    "value_and_grads",
]
