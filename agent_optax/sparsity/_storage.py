"""What a storage is: how `sparsify` keeps the active weights and the state of the inner optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import optax

from agent_optax.correction._find import StorageView

if TYPE_CHECKING:
    from agent_optax.sparsity._sparse_optimizer import SparseOptimizer
    from agent_optax.sparsity._start import Start
    from agent_optax.sparsity._state import SparsifyState


class ActiveWeights(StorageView):
    """Base class of what a storage keeps of the active weights, which is a NamedTuple too.

    ``class MyWeights(MyFields, ActiveWeights)``, where ``MyFields`` is the NamedTuple. It is also the view that the
    corrections inside the inner optimizer have of parameters: see `StorageView`.
    """

    __slots__ = ()

    def masks(self, params: optax.Params) -> Any:
        """The masks like `params`, bool, True where a weight is active; MaskedNode where nothing is pruned."""
        raise NotImplementedError

    def num_active(self) -> jax.Array:
        """The number of active weights; a float32, which may exceed 2^31."""
        raise NotImplementedError

    def num_ever_active(self) -> jax.Array:
        """The number of weights that were ever active, as `num_active`."""
        raise NotImplementedError

    def points_moved(self) -> Any:
        """The active weights after the memories in the inner state have moved to the current parameters."""
        return self


class Storage:
    """How the state of the inner optimizer is kept: `Dense()`, `Compact()`. A subclass overrides what differs."""

    needs_counts = False  # whether the number of active weights of each leaf must be known at init, and constant

    def check(self, optimizer: SparseOptimizer) -> None:
        """Raises ValueError, when `sparsify` is called, if the storage cannot work with this optimizer."""
        del optimizer

    def start(
        self, optimizer: SparseOptimizer, start: Start, params: optax.Params, key: jax.Array
    ) -> tuple[Any, optax.OptState]:
        """The `ActiveWeights` of the start masks, and the initial state of the inner optimizer."""
        raise NotImplementedError

    def update(
        self,
        optimizer: SparseOptimizer,
        grads: optax.Updates,
        state: SparsifyState,
        params: optax.Params,
        extra_args: dict[str, Any],
    ) -> tuple[optax.Updates, SparsifyState]:
        """One step; ``state.topology_step`` already counts it. Updates are -p where a weight is inactive."""
        raise NotImplementedError

    def present(self, updates: Any) -> Any:
        """The updates as the caller gets them; not inside the program that `sparsify` compiles."""
        return updates
