"""Coefficients: how much of the old gradient to use."""

from agent_optax.correction.coefficients._constant import constant
from agent_optax.correction.coefficients._gradient_regression import gradient_regression
from agent_optax.correction.coefficients._loss_regression import loss_regression
from agent_optax.correction.coefficients._scheduled import scheduled

__all__ = ["constant", "gradient_regression", "loss_regression", "scheduled"]
