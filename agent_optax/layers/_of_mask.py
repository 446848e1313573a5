"""The connections of a mask that are the fastest to multiply by."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from agent_optax._validation import check_positive_int
from agent_optax.layers._any_mask import AnyMask
from agent_optax.layers._as_mask import as_mask
from agent_optax.layers._connections import Connections
from agent_optax.layers._fan_in import SMALLEST_PRODUCT, FanIn


def connections_of(mask: Any, *, group: int | None = None) -> Connections:
    """The connections of a mask: `FanIn` where every output has the same number of inputs, `AnyMask` else.

    Args:
        mask: bool [inputs, outputs], True where a weight exists, at least once; a known one: not under `jax.jit`.
        group: how many consecutive outputs share their inputs, where they do: ``sparsify(...,
            pattern=fan_in(group=G))`` makes such masks. Otherwise each output has inputs of its own. Default None: as
            many as do in this mask, at least 16 where all do, since from there on a group is one matrix product.

    Returns:
        ``FanIn`` with this group, ``FanIn`` with groups of one output, or ``AnyMask``: the first that fits.

    Raises:
        ValueError: if the mask is not a bool array of two axes, or is False everywhere.
        TypeError: if it is traced.

    Example:
        >>> import jax.numpy as jnp
        >>> from agent_optax import layers
        >>> layers.connections_of(jnp.array([[True, True, False, False], [False, False, True, True]])).group
        2
    """
    mask = as_mask(mask)
    if group is not None:
        check_positive_int("group", group, "it is the number of consecutive outputs that share their inputs")
    counts = mask.sum(axis=0)
    if counts.min() != counts.max() or counts.min() == 0:
        return AnyMask.from_mask(mask)
    if group is None:
        return FanIn.from_mask(mask, group=_largest_group(mask))
    first = np.arange(mask.shape[1]) // group * group
    is_shared = bool((mask == mask[:, first]).all())
    return FanIn.from_mask(mask, group=group if is_shared else 1)


def _largest_group(mask: np.ndarray) -> int:
    """Inputs change between outputs at multiples of it only."""
    changes = np.flatnonzero((mask[:, 1:] != mask[:, :-1]).any(axis=0)) + 1
    return math.gcd(*changes.tolist()) or max(mask.shape[1], SMALLEST_PRODUCT)
