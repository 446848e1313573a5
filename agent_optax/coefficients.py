"""Coefficients: how much of the old gradient to use; the same names as in `agent_optax`."""

from agent_optax.correction.coefficients import constant, gradient_regression, loss_regression, scheduled

__all__ = ["constant", "gradient_regression", "loss_regression", "scheduled"]
