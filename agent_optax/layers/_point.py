"""The connections that stored parameters were stored with."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["connections", "is_kept", "num_refreshes"],
    meta_fields=["parameter"],
)
@dataclasses.dataclass(frozen=True)
class Point:
    """What a layer was connected to when a point was stored, for connections that have changed since.

    Out of date once the point has been stored again, which its number of refreshes tells.
    """

    connections: Any  # Connections
    is_kept: jax.Array  # bool, the shape of the values: weights that have existed ever since
    num_refreshes: jax.Array  # int32 []: of the memory, when the connections changed
    parameter: str  # the name of the weights
