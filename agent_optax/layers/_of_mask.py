"""The connections of a mask that are the fastest to multiply by."""

from __future__ import annotations

from typing import Any

import numpy as np

from agent_optax._validation import check_positive_int
from agent_optax.layers._any_mask import AnyMask
from agent_optax.layers._as_mask import as_mask
from agent_optax.layers._connections import Connections
from agent_optax.layers._fan_in import FanIn


def connections_of(mask: Any, *, group: int = 16) -> Connections:
    """The connections of a mask: `FanIn` where every output has the same number of inputs, `AnyMask` else.

    Args:
        mask: bool [inputs, outputs], True where a weight exists, at least once; a known one: not under `jax.jit`.
        group: how many consecutive outputs share their inputs, where they do: ``sparsify(...,
            pattern=fan_in(group=G))`` makes such masks. Otherwise each output has inputs of its own. Default 16.

    Returns:
        ``FanIn`` with this group, ``FanIn`` with groups of one output, or ``AnyMask``: the first that fits.

    Raises:
        ValueError: if the mask is not a bool array of two axes, or is False everywhere.
        TypeError: if it is traced.

    Example:
        >>> import jax.numpy as jnp
        >>> from agent_optax import layers
        >>> layers.connections_of(jnp.array([[True, False], [False, True]])).group
        1
    """
    mask = as_mask(mask)
    check_positive_int("group", group, "it is the number of consecutive outputs that share their inputs")
    counts = mask.sum(axis=0)
    if counts.min() != counts.max() or counts.min() == 0:
        return AnyMask.from_mask(mask)
    first = np.arange(mask.shape[1]) // group * group
    is_shared = bool((mask == mask[:, first]).all())
    return FanIn.from_mask(mask, group=group if is_shared else 1)
