"""Sparse layers: zeros that are never touched, neither stored nor multiplied."""

from agent_optax.layers import _serialization as _serialization
from agent_optax.layers._any_mask import AnyMask
from agent_optax.layers._connections import Connections
from agent_optax.layers._dense import from_dense, to_dense
from agent_optax.layers._fan_in import FanIn
from agent_optax.layers._init_values import init_values
from agent_optax.layers._of_mask import connections_of
from agent_optax.layers._prepare_rewiring import prepare_rewiring
from agent_optax.layers._rewire import Rewired, rewire
from agent_optax.layers._sparse_conv import sparse_conv
from agent_optax.layers._sparse_dot import sparse_dot

__all__ = [
    "Connections",
    "FanIn",
    "AnyMask",
    "connections_of",
    "sparse_dot",
    "sparse_conv",
    "rewire",
    "Rewired",
    "prepare_rewiring",
    "init_values",
    "to_dense",
    "from_dense",
]
