"""Projected gradient descent: many small steps, from one or several random starts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from agent_optax._tree import wide_dtype
from agent_optax._validation import check_positive_int
from agent_optax.adversarial._attack import (
    IterativeAttack,
    LossFn,
    check_inputs,
    check_labels,
    check_losses,
)
from agent_optax.adversarial._linf_ball import check_ball, linf_ball
from agent_optax.adversarial._sign_ascent import check_steps, sign_ascent
from agent_optax.adversarial._start import as_key, uniform_start


def pgd(
    loss_fn: LossFn,
    *,
    epsilon: float,
    step_size: float,
    num_steps: int,
    random_start: bool = True,
    restarts: int = 1,
    bounds: tuple[float, float] = (0.0, 1.0),
    targeted: bool = False,
) -> IterativeAttack:
    r"""Projected gradient descent (PGD) on the input.

    .. math::
        x^0 = \Pi(x + u), \quad u \sim U(-\epsilon, \epsilon), \qquad
        x^{k+1} = \Pi\big(x^k + \eta\,\mathrm{sign}\,\nabla_x \ell(\theta; x^k, y)\big)

    with a minus sign when targeted; the projection :math:`\Pi` keeps every iterate within `epsilon` of
    :math:`x` and within `bounds`, exactly in every floating-point dtype. With several restarts the
    result is, for each sample, the last iterate of the restart where its loss ends highest (when
    targeted: lowest). Restart r draws its start from `jax.random.fold_in(key, r)`, so the first
    restarts of a longer run are those of a shorter one.

    `loss_fn` runs the model as it is given, and should give it in evaluation mode: there a sample's
    loss does not depend on the rest of the batch, which one gradient for the whole batch relies on,
    and no running statistic learns from inputs that exist only to attack.

    Args:
      loss_fn: `loss_fn(params, inputs [B, ...], labels [B, ...]) -> losses [B]`, one per sample.
      epsilon: Radius of the attack in the maximum norm, in input units; may be traced. The paper
        trains and evaluates with 8/255.
      step_size: Length of a step, :math:`\eta`; may be traced. The paper's is 2/255.
      num_steps: Number of steps. The paper trains with 10 and evaluates with 50.
      random_start: Whether to start at a random point of the ball, rather than at the input.
      restarts: Number of random starts.
      bounds: Lowest and highest value of an input. Normalise inside `loss_fn`, so that one range
        and one radius hold for all channels.
      targeted: Whether `labels` are the classes to move to, rather than away from.

    Returns:
      `attack(params, inputs [B, ...], labels [B, ...], key=None, *, start=None, stop_when=None)
      -> inputs [B, ...]`. `key` is a PRNG key or an int. `start` [B, ...] begins there (projected)
      and draws nothing. `stop_when(inputs [B, ...]) -> bool [B]` leaves a sample at the first
      point, the start included, where it is True; the loop ends once no sample is left. Nothing is
      asked about the last iterate of a single run. No gradient flows through the result.

    Raises:
      ValueError: If `epsilon` is negative, `step_size` not positive, `num_steps` or `restarts`
        below 1, `bounds` not in order, or several restarts have no random start to tell them
        apart. By the attack: if it needs a key and has none, is given a start for several
        restarts, or if inputs are not floating point, labels not integers, or the losses not one
        per sample.

    Example:
      >>> import jax.numpy as jnp
      >>> from agent_optax import adversarial
      >>> loss_fn = adversarial.cross_entropy(lambda params, inputs: inputs @ params)
      >>> attack = adversarial.pgd(loss_fn, epsilon=0.125, step_size=0.05, num_steps=5)
      >>> attack(jnp.eye(2), jnp.array([[0.5, 1.0]]), jnp.array([0]), 0)
      Array([[0.375, 1.   ]], dtype=float32)

    References:
      Madry, Makelov, Schmidt, Tsipras and Vladu, "Towards Deep Learning Models Resistant to
      Adversarial Attacks", ICLR 2018.
    """
    check_ball(epsilon, bounds)
    check_steps(step_size, num_steps)
    check_positive_int("restarts", restarts, "pass the number of random starts, as restarts=10")
    if restarts > 1 and not random_start:
        raise ValueError(
            f"restarts must be 1 without a random start, got {restarts!r}: all would be the same; "
            "pass random_start=True."
        )
    uphill = -1.0 if targeted else 1.0

    def attack(params: Any, inputs, labels, key=None, *, start=None, stop_when=None):
        inputs = check_inputs(inputs)
        labels = check_labels(labels, len(inputs))
        if start is not None and restarts > 1:
            raise ValueError(
                f"start must be None with restarts={restarts!r}, which draw their own: build the "
                "attack with restarts=1 to begin at a given point."
            )
        ball = linf_ball(inputs, epsilon, bounds)

        def objective(x):
            return uphill * check_losses(loss_fn(params, x, labels), len(inputs))

        def ascend(start):
            return sign_ascent(
                objective,
                start,
                ball,
                step_size=step_size,
                num_steps=num_steps,
                stop_when=stop_when,
            )

        if start is not None:
            return ascend(jnp.clip(jnp.asarray(start), *ball))
        if not random_start:
            return ascend(jnp.clip(inputs, *ball))
        keys = as_key(key)

        def restart(index):
            return ascend(uniform_start(jax.random.fold_in(keys, index), inputs, epsilon, ball))

        if restarts == 1:
            return restart(0)

        def keep_highest(best, index):
            best_point, best_height = best
            point = restart(index)
            height = objective(point).astype(best_height.dtype)
            if stop_when is not None:  # a point that ends the search is not given up for another
                height = jnp.where(stop_when(point), jnp.inf, height)
            higher = height > best_height
            sample = higher.reshape((-1,) + (1,) * (inputs.ndim - 1))
            best = jnp.where(sample, point, best_point), jnp.where(higher, height, best_height)
            return best, None

        lowest = jnp.full(len(inputs), -jnp.inf, wide_dtype(inputs.dtype))
        nothing = jnp.clip(inputs, *ball), lowest
        (point, _), _ = jax.lax.scan(keep_highest, nothing, jnp.arange(restarts))
        return point

    return attack
