"""Optimizers in one line, each a chain of parts."""

from __future__ import annotations

import optax

from agent_optax.correction._coefficient import constant
from agent_optax.correction._correct import correct_gradients
from agent_optax.correction._loss_regression import loss_regression


def agent(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float | None = 0.9,
    nesterov: bool = True,
    weight_decay: float = 5e-4,
    scaling: float = 0.1,
    smoothing: float = 0.3,
) -> optax.GradientTransformationExtraArgs:
    r"""The optimizer of the paper: SGD on the adaptively corrected gradient (Algorithm 1).

    .. math::
        \hat g = g_{new} - \gamma c\, (g_{old} - \tilde g), \qquad
        \theta \leftarrow \theta - \eta\, \mathrm{momentum}(\hat g + \lambda \theta)

    It is ``optax.chain(correct_gradients(scaling=scaling, coefficient=loss_regression(smoothing)),
    optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate, momentum, nesterov))``. The defaults are the
    paper's. Its weight is small; for more variance reduction chain `correct_gradients` with `gradient_regression` and
    ``scaling=1.0`` yourself.

    Args:
        learning_rate: :math:`\eta`, a number or an Optax schedule.
        momentum: of SGD, or None for none. Default 0.9 (the paper).
        nesterov: whether momentum is Nesterov's. Default True (the paper's code).
        weight_decay: :math:`\lambda`, coupled, on all parameters. Default 5e-4 (the paper).
        scaling: :math:`\gamma`. Default 0.1 (the paper).
        smoothing: :math:`\alpha` of `loss_regression`. Default 0.3 (the paper).

    Returns:
        A `optax.GradientTransformationExtraArgs`; see `correct_gradients` for the extra arguments of its update.

    Raises:
        ValueError: as `correct_gradients` and `loss_regression`.

    Example:
        >>> import agent_optax
        >>> tx = agent_optax.agent(learning_rate=0.1)

    References:
        Lei et al., Balance is Essence, CPAL 2024, Algorithm 1.
    """
    return optax.chain(
        correct_gradients(coefficient=loss_regression(smoothing=smoothing), scaling=scaling),
        optax.add_decayed_weights(weight_decay),
        optax.sgd(learning_rate, momentum=momentum, nesterov=nesterov),
    )


def svrg(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float | None = None,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Stochastic variance-reduced gradient: the full correction, c = 1, with no adaptation.

    .. math::
        \hat g = g_{new} - (g_{old} - \tilde g), \qquad \theta \leftarrow \theta - \eta\, \hat g

    It is ``optax.chain(correct_gradients(coefficient=constant(1.0), scaling=1.0), optax.sgd(...))``.

    Args:
        learning_rate: :math:`\eta`, a number or an Optax schedule.
        momentum: of SGD, or None (default) for none.
        nesterov: whether momentum is Nesterov's.

    Returns:
        A `optax.GradientTransformationExtraArgs`; see `correct_gradients` for the extra arguments of its update.

    Raises:
        ValueError: from `update`, if an extra argument is missing.

    Example:
        >>> import agent_optax
        >>> tx = agent_optax.svrg(learning_rate=0.1)

    References:
        Johnson & Zhang, Accelerating Stochastic Gradient Descent using Predictive Variance Reduction, NeurIPS 2013.
    """
    return optax.chain(
        correct_gradients(coefficient=constant(1.0), scaling=1.0),
        optax.sgd(learning_rate, momentum=momentum, nesterov=nesterov),
    )
