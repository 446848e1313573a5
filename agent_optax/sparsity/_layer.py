"""A layer as topologies and patterns see it."""

from __future__ import annotations

from typing import NamedTuple

import jax

from agent_optax.sparsity._groups import Groups


class Layer(NamedTuple):
    """A layer of a pruned leaf at a topology update: arrays ``[*spatial, inputs, outputs]``, or of its blocks."""

    weights: jax.Array  # after the optimizer step, zero where inactive
    mask: jax.Array  # bool: active
    grads: jax.Array  # the dense gradient by which to grow
    ever_active: jax.Array | None  # bool: active at any time so far
    momentum: jax.Array | None = None  # moving average of the dense gradients, if the topology keeps one
    statistic: jax.Array | None = None  # what a running score keeps for each weight; the mean of it over a block
    groups: Groups | None = None  # what keeps the pattern, if it fixes the number of active entries of some
    count: int | None = None  # of active entries, where the storage fixes it


class Target(NamedTuple):
    """The number of active weights that a layer of a pruned leaf is to end with."""

    num_units: int  # weights, or blocks of them
    density: float | None  # the requested share of active ones; None with given masks
    num_active: int | jax.Array  # their exact number
    num_start: int | jax.Array  # of active ones at the start
