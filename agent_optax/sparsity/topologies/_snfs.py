"""SNFS: drop by magnitude, grow where the momentum is largest, in the layers where it is."""

from __future__ import annotations

import optax

from agent_optax.sparsity.topologies._drop_and_grow import DropAndGrow, drop_and_grow
from agent_optax.sparsity.topologies._scores import momentum_magnitude, weight_magnitude


def snfs(
    update_every: int = 100,
    drop_fraction: optax.ScalarOrSchedule = 0.5,
    start: int | None = None,
    stop: int | None = None,
    momentum: float = 0.9,
) -> DropAndGrow:
    r"""Sparse Networks from Scratch: weights move to where the momentum of the dense gradient is largest.

    In each layer the :math:`\lceil \zeta\, n_{active} \rceil` active weights of least magnitude are dropped. Layer l
    regrows the share

    .. math::
        \frac{v_l}{\sum_j v_j}, \qquad v_l = \frac{1}{n_{active}} \sum_{active} |m|,
        \qquad m \leftarrow \beta m + (1 - \beta) g

    of all that were dropped, at the inactive positions with the largest :math:`|m|`. A layer takes at most 99% of its
    inactive weights, the rest is spread equally over the layers; what rounding loses is grown at later updates.

    Layers change in size, so this needs ``storage="dense"``; m costs one array like the pruned parameters.

    Args:
        update_every: optimizer steps between topology updates. Default 100 (RigL's; the paper updates once an epoch).
        drop_fraction: :math:`\zeta`, in [0, 1], or an Optax schedule called with the step. Default 0.5 (the paper,
            which anneals it: pass ``optax.cosine_decay_schedule(0.5, total_steps)`` for that).
        start: the first step with an update, counted from 1. Default: `update_every`.
        stop: no update from this step on. Default: never stops.
        momentum: :math:`\beta`, the decay of the average, in [0, 1). Default 0.9 (the paper).

    Returns:
        A topology for `agent_optax.sparsify`.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> import agent_optax, optax
        >>> tx = agent_optax.sparsify(optax.sgd(0.1, momentum=0.9), agent_optax.snfs(), sparsity=0.9)

    References:
        Dettmers and Zettlemoyer, Sparse Networks from Scratch: Faster Training without Losing Performance, 2019.
    """
    return drop_and_grow(
        weight_magnitude,
        momentum_magnitude,
        update_every=update_every,
        drop_fraction=drop_fraction,
        start=start,
        stop=stop,
        redistribute=momentum_magnitude,
        momentum=momentum,
    )
