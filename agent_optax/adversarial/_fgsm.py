"""The fast gradient sign method: one full step."""

from __future__ import annotations

from typing import Any

from agent_optax.adversarial._attack import Attack, LossFn, check_inputs, check_labels, check_losses
from agent_optax.adversarial._linf_ball import check_ball, linf_ball
from agent_optax.adversarial._sign_ascent import sign_ascent


def fgsm(
    loss_fn: LossFn,
    *,
    epsilon: float,
    bounds: tuple[float, float] = (0.0, 1.0),
    targeted: bool = False,
) -> Attack:
    r"""The fast gradient sign method (FGSM).

    .. math::
        x' = \Pi\big(x + \epsilon\,\mathrm{sign}\,\nabla_x \ell(\theta; x, y)\big)

    with a minus sign when targeted; the projection :math:`\Pi` keeps :math:`x'` within `epsilon` of :math:`x` and
    within `bounds`, exactly in every floating-point dtype.

    `loss_fn` runs the model as it is given, and should give it in evaluation mode: there a sample's
    loss does not depend on the rest of the batch, which one gradient for the whole batch relies on,
    and no running statistic learns from inputs that exist only to attack.

    Args:
      loss_fn: `loss_fn(params, inputs [B, ...], labels [B, ...]) -> losses [B]`, one per sample.
      epsilon: Radius of the attack in the maximum norm, in input units; may be traced.
      bounds: Lowest and highest value of an input. Normalise inside `loss_fn`, so that one range
        and one radius hold for all channels.
      targeted: Whether `labels` are the classes to move to, rather than away from.

    Returns:
      `attack(params, inputs [B, ...], labels [B, ...], key=None) -> inputs [B, ...]`. The key is
      ignored. `stop_when` is as in `pgd`. No gradient flows through the result.

    Raises:
      ValueError: If `epsilon` is negative or `bounds` are not in order. By the attack: if inputs
        are not floating point, labels not integers, or the losses not one per sample.

    Example:
      >>> import jax.numpy as jnp
      >>> from agent_optax import adversarial
      >>> loss_fn = adversarial.cross_entropy(lambda params, inputs: inputs @ params)
      >>> attack = adversarial.fgsm(loss_fn, epsilon=0.125)
      >>> attack(jnp.eye(2), jnp.array([[0.5, 1.0]]), jnp.array([0]))
      Array([[0.375, 1.   ]], dtype=float32)

    References:
      Goodfellow, Shlens and Szegedy, "Explaining and Harnessing Adversarial Examples", ICLR 2015.
    """
    check_ball(epsilon, bounds)
    uphill = -1.0 if targeted else 1.0

    def attack(params: Any, inputs, labels, key=None, *, stop_when=None):
        del key
        inputs = check_inputs(inputs)
        labels = check_labels(labels, len(inputs))

        def objective(x):
            return uphill * check_losses(loss_fn(params, x, labels), len(inputs))

        ball = linf_ball(inputs, epsilon, bounds)
        return sign_ascent(objective, inputs, ball, step_size=epsilon, num_steps=1, stop_when=stop_when)

    return attack
