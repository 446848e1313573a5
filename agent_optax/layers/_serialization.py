"""Connections as arguments of a function that `jax.export` serializes."""

from __future__ import annotations

import json
from typing import Any

import jax.export

from agent_optax.layers._any_mask import AnyMask
from agent_optax.layers._fan_in import FanIn
from agent_optax.layers._point import Point
from agent_optax.layers._rows import Rows


def _as_bytes(static_fields: Any) -> bytes:
    return json.dumps(static_fields).encode()


def _as_static_fields(serialized: bytes) -> Any:
    return tuple(json.loads(serialized))


for _node in (FanIn, AnyMask, Rows, Point):
    jax.export.register_pytree_node_serialization(
        _node,
        serialized_name=f"agent_optax.layers.{_node.__name__}",
        serialize_auxdata=_as_bytes,
        deserialize_auxdata=_as_static_fields,
    )
