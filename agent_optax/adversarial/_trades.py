"""TRADES: right on clean inputs, and of the same opinion nearby."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from agent_optax.adversarial._attack import IterativeAttack, LogitsFn, check_inputs
from agent_optax.adversarial._divergence import check_beta, check_logits, kl_divergence, widen
from agent_optax.adversarial._linf_ball import check_ball, linf_ball
from agent_optax.adversarial._sign_ascent import check_steps, sign_ascent
from agent_optax.adversarial._start import as_key, check_start_scale, gaussian_start


def trades_attack(
    logits_fn: LogitsFn,
    *,
    epsilon: float,
    step_size: float,
    num_steps: int,
    bounds: tuple[float, float] = (0.0, 1.0),
    start_scale: float = 0.001,
) -> IterativeAttack:
    r"""The attack of TRADES: away from the model's own answer, whatever the label.

    .. math::
        x^0 = x + s\,u, \quad u \sim N(0, I), \qquad
        x^{k+1} = \Pi\big(x^k + \eta\,\mathrm{sign}\,\nabla_{x^k}
        \mathrm{KL}(p_\theta(x)\,\|\,p_\theta(x^k))\big)

    The start is not projected, as in the published code; every later iterate is, exactly in every
    floating-point dtype. :math:`p_\theta(x)` is computed once.

    `logits_fn` runs the model as it is given, and should give it in evaluation mode: there a
    sample's logits do not depend on the rest of the batch, which one gradient for the whole batch
    relies on, and no running statistic learns from inputs that exist only to attack.

    Args:
      logits_fn: `logits_fn(params, inputs [B, ...]) -> logits [B, K]`.
      epsilon: Radius of the attack in the maximum norm, in input units; may be traced. The paper
        trains with 8/255.
      step_size: Length of a step, :math:`\eta`; may be traced. The paper's is 2/255.
      num_steps: Number of steps. The paper's is 10.
      bounds: Lowest and highest value of an input.
      start_scale: Standard deviation of the noise at the start, :math:`s`. It must not be 0: at :math:`x` the
        divergence has its minimum and no slope.

    Returns:
      `attack(params, inputs [B, ...], labels, key=None, *, start=None, stop_when=None)
      -> inputs [B, ...]`. The labels are ignored and may be None. `key` is a PRNG key or an int.
      `start` [B, ...] begins there and draws nothing. With `stop_when`, which is as in `pgd`, the
      start is projected, for a sample may stop there. No gradient flows through the result.

    Raises:
      ValueError: If `epsilon` is negative, `step_size` or `start_scale` not positive, `num_steps`
        below 1, or `bounds` not in order. By the attack: if it has neither key nor start, or if
        inputs are not floating point.

    Example:
      >>> import jax.numpy as jnp
      >>> from agent_optax import adversarial
      >>> logits_fn = lambda params, inputs: inputs @ params
      >>> attack = adversarial.trades_attack(logits_fn, epsilon=0.1, step_size=0.05, num_steps=4)
      >>> inputs = jnp.array([[0.6, 0.05]])
      >>> float(jnp.abs(attack(jnp.eye(2), inputs, None, 0) - inputs).max())
      0.1

    References:
      Zhang, Yu, Jiao, Xing, El Ghaoui and Jordan, "Theoretically Principled Trade-off between
      Robustness and Accuracy", ICML 2019.
    """
    check_ball(epsilon, bounds)
    check_steps(step_size, num_steps)
    check_start_scale(start_scale)

    def attack(params: Any, inputs, labels=None, key=None, *, start=None, stop_when=None):
        del labels
        inputs = check_inputs(inputs)
        if start is None:
            start = gaussian_start(as_key(key), inputs, start_scale)

        def log_probs(x):
            return jax.nn.log_softmax(widen(logits_fn(params, x)))

        clean = log_probs(inputs)

        def objective(x):
            return kl_divergence(clean, log_probs(x))

        ball = linf_ball(inputs, epsilon, bounds)
        return sign_ascent(objective, start, ball, step_size=step_size, num_steps=num_steps, stop_when=stop_when)

    return attack


def trades_loss(logits: jax.Array, adversarial_logits: jax.Array, labels: jax.Array, beta: float = 6.0) -> jax.Array:
    r"""The TRADES objective.

    .. math::
        L = \frac1B \sum_i \big[ -\log p_i(y_i) + \beta\,\mathrm{KL}(p_i\,\|\,q_i) \big]

    with :math:`p` the softmax of `logits` and :math:`q` that of `adversarial_logits`. The gradient flows
    through both. It is computed in float32 at least.

    Args:
      logits: Logits on clean inputs [B, K].
      adversarial_logits: Logits on the same inputs, attacked [B, K].
      labels: Integer classes [B].
      beta: Weight of the divergence, :math:`\beta`; may be traced. The paper's is 6.

    Returns:
      The mean loss, a scalar.

    Raises:
      ValueError: If `beta` is negative, logits are not floats [B, K] of one shape, or labels are
        not B integers.

    Example:
      >>> import jax.numpy as jnp
      >>> from agent_optax import adversarial
      >>> adversarial.trades_loss(jnp.array([[2.0, 0.0]]), jnp.array([[1.0, 0.0]]), jnp.array([0]))
      Array(0.530, dtype=float32)

    References:
      Zhang, Yu, Jiao, Xing, El Ghaoui and Jordan, "Theoretically Principled Trade-off between
      Robustness and Accuracy", ICML 2019.
    """
    check_beta(beta)
    logits, adversarial_logits, labels = check_logits(logits, adversarial_logits, labels)
    natural = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    divergence = kl_divergence(jax.nn.log_softmax(logits), jax.nn.log_softmax(adversarial_logits))
    return jnp.mean(natural + beta * divergence)
