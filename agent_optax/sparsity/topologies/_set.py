"""SET: drop by magnitude, grow at random."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from agent_optax._validation import check_positive_int
from agent_optax.sparsity.topologies._drop_and_grow import DropAndGrow
from agent_optax.sparsity.topologies._scores import at_random, weight_magnitude
from agent_optax.sparsity.topologies._update_times import check_drop_fraction, update_times

ITOP_FINAL_FRACTION = 0.005


def set_(
    update_every: int = 100,
    drop_fraction: optax.ScalarOrSchedule = 0.3,
    start: int | None = None,
    stop: int | None = None,
) -> DropAndGrow:
    r"""Sparse Evolutionary Training: the smallest active weights are replaced by random new ones.

    In each layer the :math:`\lceil \zeta\, n_{active} \rceil` active weights of least magnitude are dropped, and as
    many positions, uniformly at random among the inactive ones, are grown from zero.

    Args:
        update_every: optimizer steps between topology updates. Default 100 (RigL's).
        drop_fraction: :math:`\zeta`, in [0, 1], or an Optax schedule called with the step. Default 0.3 (SET's).
        start: the first step with an update, counted from 1. Default: `update_every`.
        stop: no update from this step on. Default: never stops.

    Returns:
        A topology for `agent_optax.sparsify`.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> import agent_optax, optax
        >>> tx = agent_optax.sparsify(optax.sgd(0.1), agent_optax.set_(update_every=500), sparsity=0.95)

    References:
        Mocanu et al., Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity inspired by
        Network Science, Nature Communications 2018.
    """
    check_drop_fraction(drop_fraction)
    return DropAndGrow(update_times(update_every, start, stop), drop_fraction, weight_magnitude, at_random)


def itop_drop_fraction(total_steps: int, initial: float = 0.5) -> optax.Schedule:
    """The cosine of ITOP: from `initial` to 0.005 over training."""
    check_positive_int("total_steps", total_steps, "it is the number of optimizer steps in the whole training run")
    schedule = optax.cosine_decay_schedule(initial, total_steps, alpha=ITOP_FINAL_FRACTION / initial)
    return lambda step: schedule(jnp.asarray(step).astype(float))


def set_itop(total_steps: int, update_every: int = 1500) -> DropAndGrow:
    r"""SET as in-time over-parameterisation: long intervals, so that grown weights have time to matter.

    `set_` with a drop fraction that falls over `total_steps` T as

    .. math::
        \zeta_t = 0.005 + \tfrac12 (0.5 - 0.005)(1 + \cos(\pi t / T))

    Args:
        total_steps: T, optimizer steps in the whole training run.
        update_every: optimizer steps between topology updates. Default 1500 (the ITOP paper, batches of 128).

    Returns:
        A topology for `agent_optax.sparsify`.

    Raises:
        ValueError: if an argument is not a positive whole number.

    Example:
        >>> import agent_optax, optax
        >>> topology = agent_optax.set_itop(total_steps=100_000)
        >>> tx = agent_optax.sparsify(agent_optax.agent(0.1), topology, sparsity=0.99)

    References:
        Liu et al., Do We Actually Need Dense Over-Parameterization? In-Time Over-Parameterization in Sparse
        Training, ICML 2021.
    """
    return set_(update_every, itop_drop_fraction(total_steps))
