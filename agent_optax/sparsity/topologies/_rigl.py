"""RigL: drop by magnitude, grow where the dense gradient is largest."""

from __future__ import annotations

import optax

from agent_optax.sparsity.topologies._drop_and_grow import DropAndGrow
from agent_optax.sparsity.topologies._scores import gradient_magnitude, weight_magnitude
from agent_optax.sparsity.topologies._set import itop_drop_fraction
from agent_optax.sparsity.topologies._update_times import check_drop_fraction, update_times


def rigl(
    update_every: int = 100,
    drop_fraction: optax.ScalarOrSchedule = 0.3,
    start: int | None = None,
    stop: int | None = None,
) -> DropAndGrow:
    r"""The rigged lottery: the smallest active weights are replaced where the gradient is largest.

    In each layer the :math:`\lceil \zeta\, n_{active} \rceil` active weights of least magnitude are dropped, and as
    many inactive positions with the largest :math:`|g|` are grown from zero; g is the dense gradient of the same
    step, raw or, with ``sparsify(..., grow_by="corrected")``, corrected.

    Args:
        update_every: optimizer steps between topology updates. Default 100 (the RigL paper).
        drop_fraction: :math:`\zeta`, in [0, 1], or an Optax schedule called with the step. Default 0.3 (the RigL
            paper, which anneals it: pass ``optax.cosine_decay_schedule(0.3, total_steps)`` for that).
        start: the first step with an update, counted from 1. Default: `update_every`.
        stop: no update from this step on (the RigL paper stops at 75% of training). Default: never stops.

    Returns:
        A topology for `agent_optax.sparsify`.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> import agent_optax, optax
        >>> tx = agent_optax.sparsify(optax.adamw(1e-3), agent_optax.rigl(update_every=100), sparsity=0.9)

    References:
        Evci et al., Rigging the Lottery: Making All Tickets Winners, ICML 2020.
    """
    check_drop_fraction(drop_fraction)
    return DropAndGrow(update_times(update_every, start, stop), drop_fraction, weight_magnitude, gradient_magnitude)


def rigl_itop(total_steps: int, update_every: int = 1500) -> DropAndGrow:
    r"""RigL as in-time over-parameterisation: long intervals, so that grown weights have time to matter.

    `rigl` with a drop fraction that falls over `total_steps` T as

    .. math::
        \zeta_t = 0.005 + \tfrac12 (0.5 - 0.005)(1 + \cos(\pi t / T))

    Args:
        total_steps: T, optimizer steps in the whole training run.
        update_every: optimizer steps between topology updates. Default 1500 (as for `set_itop`).

    Returns:
        A topology for `agent_optax.sparsify`.

    Raises:
        ValueError: if an argument is not a positive whole number.

    Example:
        >>> import agent_optax, optax
        >>> tx = agent_optax.sparsify(optax.sgd(0.1), agent_optax.rigl_itop(total_steps=100_000), sparsity=0.99)

    References:
        Liu et al., Do We Actually Need Dense Over-Parameterization? In-Time Over-Parameterization in Sparse
        Training, ICML 2021.
    """
    return rigl(update_every, itop_drop_fraction(total_steps))
