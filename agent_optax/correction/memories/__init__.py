"""Memories: where the old gradient comes from."""

from agent_optax.correction.memories._difference import difference
from agent_optax.correction.memories._history import history
from agent_optax.correction.memories._recursion import recursion
from agent_optax.correction.memories._snapshot import snapshot
from agent_optax.correction.memories._table import table

__all__ = ["difference", "history", "recursion", "snapshot", "table"]
