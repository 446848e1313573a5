"""The loss that most attacks climb."""

from __future__ import annotations

import optax

from agent_optax.adversarial._attack import LogitsFn, LossFn
from agent_optax.adversarial._divergence import widen


def cross_entropy(logits_fn: LogitsFn) -> LossFn:
    r"""The cross-entropy of each sample, as a loss for `fgsm` and `pgd`.

    .. math::
        \ell(\theta; x, y) = -\log \mathrm{softmax}(f_\theta(x))_y

    It is computed in float32 at least, whatever the dtype of the logits.

    Args:
      logits_fn: `logits_fn(params, inputs [B, ...]) -> logits [B, K]`, the model in evaluation
        mode.

    Returns:
      `loss_fn(params, inputs [B, ...], labels [B]) -> losses [B]`.

    Example:
      >>> import jax.numpy as jnp
      >>> from agent_optax import adversarial
      >>> loss_fn = adversarial.cross_entropy(lambda params, inputs: inputs @ params)
      >>> loss_fn(jnp.eye(2), jnp.zeros((1, 2)), jnp.array([0]))
      Array([0.693], dtype=float32)

    References:
      Goodfellow, Shlens and Szegedy, "Explaining and Harnessing Adversarial Examples", ICLR 2015.
    """

    def loss_fn(params, inputs, labels):
        logits = widen(logits_fn(params, inputs))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    return loss_fn
