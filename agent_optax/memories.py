"""Memories: where the old gradient comes from; the same names as in `agent_optax`."""

from agent_optax.correction.memories import difference, history, recursion, snapshot, table

__all__ = ["difference", "history", "recursion", "snapshot", "table"]
