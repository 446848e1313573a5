"""MART: most attention to samples that are wrong before any attack."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from agent_optax.adversarial._attack import IterativeAttack, LogitsFn, check_classes, check_inputs
from agent_optax.adversarial._cross_entropy import cross_entropy
from agent_optax.adversarial._divergence import check_beta, check_logits, kl_divergence
from agent_optax.adversarial._linf_ball import check_ball, linf_ball
from agent_optax.adversarial._sign_ascent import check_steps, sign_ascent
from agent_optax.adversarial._start import as_key, check_start_scale, gaussian_start


def mart_attack(
    logits_fn: LogitsFn,
    *,
    epsilon: float,
    step_size: float,
    num_steps: int,
    bounds: tuple[float, float] = (0.0, 1.0),
    start_scale: float = 0.001,
) -> IterativeAttack:
    r"""The attack of MART: PGD on the cross-entropy, from next to the input.

    .. math::
        x^0 = x + s\,u, \quad u \sim N(0, I), \qquad
        x^{k+1} = \Pi\big(x^k - \eta\,\mathrm{sign}\,\nabla_{x^k} \log p_\theta(x^k)_y\big)

    The start is not projected, as in the published code; every later iterate is, exactly in every
    floating-point dtype.

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
      start_scale: Standard deviation of the noise at the start, :math:`s`.

    Returns:
      `attack(params, inputs [B, ...], labels [B], key=None, *, start=None, stop_when=None)
      -> inputs [B, ...]`. `key` is a PRNG key or an int. `start` [B, ...] begins there and draws
      nothing. With `stop_when`, which is as in `pgd`, the start is projected, for a sample may stop
      there. No gradient flows through the result.

    Raises:
      ValueError: If `epsilon` is negative, `step_size` or `start_scale` not positive, `num_steps`
        below 1, or `bounds` not in order. By the attack: if it has neither key nor start, or if
        inputs are not floating point or labels not integers.

    Example:
      >>> import jax.numpy as jnp
      >>> from agent_optax import adversarial
      >>> logits_fn = lambda params, inputs: inputs @ params
      >>> attack = adversarial.mart_attack(logits_fn, epsilon=0.125, step_size=0.05, num_steps=4)
      >>> attack(jnp.eye(2), jnp.array([[0.5, 1.0]]), jnp.array([0]), 0)
      Array([[0.375, 1.   ]], dtype=float32)

    References:
      Wang, Zou, Yi, Bailey, Ma and Gu, "Improving Adversarial Robustness Requires Revisiting
      Misclassified Examples", ICLR 2020.
    """
    check_ball(epsilon, bounds)
    check_steps(step_size, num_steps)
    check_start_scale(start_scale)
    loss_fn = cross_entropy(logits_fn)

    def attack(params: Any, inputs, labels, key=None, *, start=None, stop_when=None):
        inputs = check_inputs(inputs)
        labels = check_classes(labels, len(inputs))
        if start is None:
            start = gaussian_start(as_key(key), inputs, start_scale)

        def objective(x):
            return loss_fn(params, x, labels)

        ball = linf_ball(inputs, epsilon, bounds)
        return sign_ascent(objective, start, ball, step_size=step_size, num_steps=num_steps, stop_when=stop_when)

    return attack


def mart_loss(logits: jax.Array, adversarial_logits: jax.Array, labels: jax.Array, beta: float = 6.0) -> jax.Array:
    r"""The MART objective.

    .. math::
        L = \frac1B \sum_i \big[ -\log q_i(y_i) - \log(1 - q_i(k_i))
        + \beta\,\mathrm{KL}(p_i\,\|\,q_i)\,(1 - p_i(y_i)) \big], \qquad
        k_i = \arg\max_{k \ne y_i} q_i(k)

    with :math:`p` the softmax of `logits` and :math:`q` that of `adversarial_logits`. The gradient flows
    through both, and through the weight :math:`1 - p_i(y_i)` as well. As in the published code the two
    ones are 1.0001 (so that the logarithm stays finite) and 1.0000001. It is computed in float32 at
    least.

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
      >>> adversarial.mart_loss(jnp.array([[2.0, 0.0]]), jnp.array([[1.0, 0.0]]), jnp.array([0]))
      Array(0.674, dtype=float32)

    References:
      Wang, Zou, Yi, Bailey, Ma and Gu, "Improving Adversarial Robustness Requires Revisiting
      Misclassified Examples", ICLR 2020.
    """
    check_beta(beta)
    logits, adversarial_logits, labels = check_logits(logits, adversarial_logits, labels)
    p, q = jax.nn.log_softmax(logits), jax.nn.log_softmax(adversarial_logits)
    is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    rival = jnp.argmax(jnp.where(is_label, -jnp.inf, adversarial_logits), axis=-1)

    boosted = -_at(q, labels) - jnp.log(1.0001 - jnp.exp(_at(q, rival)) + 1e-12)
    weighted = kl_divergence(p, q) * (1.0000001 - jnp.exp(_at(p, labels)))
    return jnp.mean(boosted + beta * weighted)


def _at(table: jax.Array, classes: jax.Array) -> jax.Array:
    """`table[i, classes[i]]` for each i."""
    return jnp.take_along_axis(table, classes[:, None], axis=-1)[:, 0]
