"""The part of the samples that no attack of a given strength gets wrong."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from agent_optax._validation import check_positive_int
from agent_optax.adversarial._attack import Attack, LogitsFn, check_classes, check_inputs
from agent_optax.adversarial._cross_entropy import cross_entropy
from agent_optax.adversarial._pgd import pgd
from agent_optax.adversarial._start import as_key


def robust_accuracy(
    logits_fn: LogitsFn,
    params: Any,
    inputs: jax.Array,
    labels: jax.Array,
    *,
    key: Any,
    attack: Attack | None = None,
    restarts: int = 10,
    batch_size: int = 128,
) -> jax.Array:
    r"""Accuracy in the worst case over every point that the attack visits.

    .. math::
        A = \frac1N \sum_i \min_{x' \in V_i} \mathbf 1[\arg\max f_\theta(x') = y_i], \qquad
        V_i = \{x_i\} \cup \{x_i^{r,k} : r \text{ a restart}, k \text{ a step}\}

    A sample counts as robust if the model is right on the sample itself, on the start of each
    restart and on each iterate. So A is at most the clean accuracy, and more steps from the same
    starts, or more restarts, can only lower it: restart r draws from the same key whatever their
    number. Logits with a NaN are wrong.

    A sample that was got wrong is left alone from then on, and a batch ends early once none of its
    samples is left, so weak models are evaluated faster. The function is pure; under `jax.jit` it
    is one program with a loop over batches, and outside it is compiled at each call.

    `logits_fn` must run the model in evaluation mode: the answer on one sample must not depend on
    the others in its batch.

    Args:
      logits_fn: `logits_fn(params, inputs [B, ...]) -> logits [B, K]`.
      params: Parameters of the model, a pytree.
      inputs: Floating-point samples [N, ...], N > 0.
      labels: Integer classes [N].
      key: A PRNG key or an int. Starts depend on `batch_size`, too.
      attack: Any attack of this package, built with its own `restarts=1`. By default the paper's
        evaluation, PGD with 50 steps of 2/255 on the cross-entropy, within 8/255, on inputs
        in [0, 1].
      restarts: Number of times the attack is run, 10 in the paper. For attacks without randomness
        1 is enough.
      batch_size: Number of samples attacked at once; N need not be a multiple of it.

    Returns:
      The robust accuracy, a float32 scalar from 0 to 1.

    Raises:
      ValueError: If `restarts` or `batch_size` is below 1, there are no samples, inputs are not
        floating point, labels are not N integers, or there is no key.

    Example:
      >>> import functools
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from agent_optax import adversarial
      >>> logits_fn = lambda params, inputs: inputs @ params
      >>> attack = adversarial.pgd(adversarial.cross_entropy(logits_fn), epsilon=0.1, step_size=0.02, num_steps=20)
      >>> evaluate = jax.jit(functools.partial(adversarial.robust_accuracy, logits_fn, attack=attack, restarts=2))
      >>> inputs = jnp.array([[0.9, 0.1], [0.55, 0.45], [0.1, 0.9], [0.2, 0.7]])
      >>> evaluate(jnp.eye(2), inputs, jnp.array([0, 0, 1, 0]), key=0)
      Array(0.5, dtype=float32)

    References:
      Madry, Makelov, Schmidt, Tsipras and Vladu, "Towards Deep Learning Models Resistant to
      Adversarial Attacks", ICLR 2018.

      Lei, Xu, Zhang, He and Mallick, "Balance is Essence: Accelerating Sparse Training via Adaptive
      Gradient Correction", CPAL 2024.
    """
    check_positive_int("restarts", restarts, "pass the number of random starts, as restarts=10")
    check_positive_int("batch_size", batch_size, "pass the number of samples attacked at once")
    inputs = check_inputs(inputs)
    num_samples = len(inputs)
    labels = check_classes(labels, num_samples)
    if num_samples == 0:
        raise ValueError(f"inputs must hold a sample, got shape {inputs.shape}: pass [N, ...], N > 0.")
    key = as_key(key)
    if attack is None:
        attack = pgd(cross_entropy(logits_fn), epsilon=8 / 255, step_size=2 / 255, num_steps=50)

    batch_size = min(batch_size, num_samples)
    num_batches = -(-num_samples // batch_size)

    def batched(array):
        padding = [(0, num_batches * batch_size - num_samples)] + [(0, 0)] * (array.ndim - 1)
        padded = jnp.pad(array, padding, mode="edge")
        return padded.reshape(num_batches, batch_size, *array.shape[1:])

    def robust_samples(batch):
        index, x, y, is_sample = batch

        def is_right(x):
            logits = logits_fn(params, x)
            return (jnp.argmax(logits, -1) == y) & ~jnp.any(jnp.isnan(logits), -1)

        def survive(robust, restart):
            seed = jax.random.fold_in(jax.random.fold_in(key, restart), index)
            attacked = attack(params, x, y, seed, stop_when=lambda x: ~(robust & is_right(x)))
            return robust & is_right(attacked), None

        # Padding counts as got wrong from the start, so that no batch goes on for its sake.
        robust, _ = jax.lax.scan(survive, is_sample & is_right(x), jnp.arange(restarts))
        return jnp.sum(robust)

    is_sample = jnp.arange(num_batches * batch_size).reshape(num_batches, batch_size) < num_samples
    batches = jnp.arange(num_batches), batched(inputs), batched(labels), is_sample
    robust = jnp.sum(jax.lax.map(robust_samples, batches))
    return robust.astype(jnp.float32) / num_samples
