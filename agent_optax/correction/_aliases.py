"""Optimizers in one line, each a chain of parts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from agent_optax._validation import check_fraction, check_positive_int
from agent_optax.correction._correct import correct_gradients
from agent_optax.correction.coefficients._constant import constant
from agent_optax.correction.coefficients._loss_regression import loss_regression
from agent_optax.correction.coefficients._scheduled import scheduled
from agent_optax.correction.memories._recursion import recursion


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


def alpha_svrg(
    learning_rate: optax.ScalarOrSchedule,
    num_refreshes: int,
    initial: float = 0.75,
    momentum: float | None = None,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""SVRG with a coefficient that decays linearly to 0 over the refreshes of a run: alpha-SVRG.

    .. math::
        \hat g = g_{new} - \alpha_s (g_{old} - \tilde g), \qquad
        \alpha_s = \alpha_0 \left(1 - \frac{s}{S - 1}\right), \quad s = 0, \ldots, S - 1, \qquad
        \theta \leftarrow \theta - \eta\, \hat g

    s counts calls of `agent_optax.refresh` from 0, so the coefficient is constant between two of them, and 0 after
    the last, which a run may leave out; from then on it stays 0. It is ``optax.chain(correct_gradients(coefficient=
    scheduled(decay), scaling=1.0), optax.sgd(...))``; the authors put AdamW in the place of SGD, and so can you.

    Args:
        learning_rate: :math:`\eta`, a number or an Optax schedule.
        num_refreshes: S, the refreshes of the whole run; usually the number of epochs.
        initial: :math:`\alpha_0`, in [0, 1]. Default 0.75 (the authors').
        momentum: of SGD, or None (default) for none.
        nesterov: whether momentum is Nesterov's.

    Returns:
        A `optax.GradientTransformationExtraArgs`; see `correct_gradients` for the extra arguments of its update.

    Raises:
        ValueError: if `initial` is outside [0, 1] or `num_refreshes` is not a positive whole number.

    Example:
        >>> import agent_optax
        >>> tx = agent_optax.alpha_svrg(learning_rate=0.1, num_refreshes=100)

    References:
        Yin et al., A Coefficient Makes SVRG Effective, ICLR 2025 (https://arxiv.org/abs/2311.05589).
    """
    check_fraction("initial", initial, "the authors take 0.75")
    if not isinstance(num_refreshes, jax.Array):  # an array comes from optax.inject_hyperparams
        check_positive_int("num_refreshes", num_refreshes, "it counts the calls of refresh in the whole run")

    def decay(position: jax.typing.ArrayLike) -> jax.Array:
        return initial * jnp.clip(1 - jnp.asarray(position) / jnp.maximum(num_refreshes - 1, 1), 0, 1)

    return optax.chain(
        correct_gradients(coefficient=scheduled(decay), scaling=1.0),
        optax.sgd(learning_rate, momentum=momentum, nesterov=nesterov),
    )


def storm(
    learning_rate: optax.ScalarOrSchedule,
    a: optax.ScalarOrSchedule = 0.1,
) -> optax.GradientTransformationExtraArgs:
    r"""STORM, stochastic recursive momentum: the gradient estimate corrects itself, with no pass over the data.

    .. math::
        \hat g_t = \nabla \ell(B_t | \theta_t) + (1 - a_t)\,
            \bigl(\hat g_{t-1} - \nabla \ell(B_t | \theta_{t-1})\bigr), \qquad
        \theta \leftarrow \theta - \eta\, \hat g_t

    It is ``optax.chain(correct_gradients(recursion(), constant(1 - a), scaling=1.0), optax.sgd(learning_rate))``: a is
    what the estimate forgets in a step, and the coefficient is what it keeps, c = 1 - a. a = 1 is SGD; a = 0 is the
    inner loop of SARAH, and never forgets the error of its first step. The paper takes :math:`a_t = \kappa \eta_t^2`
    with a learning rate that adapts to gradient norms; here both are yours to choose, as numbers or schedules. At a
    constant learning rate a constant a leaves a noise floor, below that of SGD when a is small against
    :math:`\eta` times the curvature.

    Args:
        learning_rate: :math:`\eta`, a number or an Optax schedule.
        a: the momentum parameter, in [0, 1], or an Optax schedule called with the step, from 0. Default 0.1 (ours).

    Returns:
        A `optax.GradientTransformationExtraArgs`; its update needs `params` and ``old_grads=``, as `value_and_grads`
        gives it.

    Raises:
        ValueError: if `a` is outside [0, 1]; from `update`, if ``old_grads`` or `params` is missing.

    Example:
        >>> import agent_optax
        >>> tx = agent_optax.storm(learning_rate=0.1, a=0.1)

    References:
        Cutkosky & Orabona, Momentum-Based Variance Reduction in Non-Convex SGD, NeurIPS 2019.
    """
    if callable(a):
        coefficient = scheduled(lambda step: 1 - a(step))
    else:
        check_fraction("a", a, "1 is SGD, 0 keeps the whole correction")
        coefficient = constant(1 - a)
    return optax.chain(correct_gradients(recursion(), coefficient, scaling=1.0), optax.sgd(learning_rate))
