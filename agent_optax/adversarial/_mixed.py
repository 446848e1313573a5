"""Mixed adversarial training: part of the batch stays clean."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from agent_optax._validation import check_fraction
from agent_optax.adversarial._attack import Attack, check_inputs, check_labels


def mixed_attack(attack: Attack, *, fraction: float = 0.5) -> Attack:
    r"""Attacks part of each batch and leaves the rest clean.

    .. math::
        x'_i = x_i \ (i < B - n), \qquad x'_i = \mathrm{attack}(x_i) \ (i \ge B - n), \qquad
        n = \mathrm{round}(\mathrm{fraction} \cdot B)

    The clean samples come first and order is kept, so labels need no change; batches should be
    shuffled, as they are in training. The attack sees only the samples that it moves and costs
    accordingly.

    Args:
      attack: Any attack, such as `pgd(...)`.
      fraction: Part of the batch to attack, from 0 to 1. The paper's mixed training attacks half.

    Returns:
      `attack(params, inputs [B, ...], labels [B, ...], key=None, *, stop_when=None)
      -> inputs [B, ...]`, for training. `stop_when` is asked about the attacked samples alone
      ([n, ...] -> bool [n]).

    Raises:
      ValueError: If `fraction` is not between 0 and 1. By the attack: if inputs are not floating
        point, labels not integers, or for the reasons of the attack inside.

    Example:
      >>> import jax.numpy as jnp
      >>> from agent_optax import adversarial
      >>> loss_fn = adversarial.cross_entropy(lambda params, inputs: inputs @ params)
      >>> attack = adversarial.mixed_attack(adversarial.fgsm(loss_fn, epsilon=0.125))
      >>> attack(jnp.eye(2), jnp.array([[0.5, 1.0], [0.5, 1.0]]), jnp.array([0, 0]))
      Array([[0.5  , 1.   ],
             [0.375, 1.   ]], dtype=float32)

    References:
      Goodfellow, Shlens and Szegedy, "Explaining and Harnessing Adversarial Examples", ICLR 2015.
    """
    check_fraction("fraction", fraction, "pass the part of the batch to attack, as fraction=0.5")

    def mixed(params: Any, inputs, labels, key=None, *, stop_when=None):
        inputs = check_inputs(inputs)
        labels = check_labels(labels, len(inputs))
        num_clean = len(inputs) - round(fraction * len(inputs))
        if num_clean == len(inputs):
            return inputs
        attacked = attack(params, inputs[num_clean:], labels[num_clean:], key, stop_when=stop_when)
        return jnp.concatenate([inputs[:num_clean], attacked])

    return mixed
