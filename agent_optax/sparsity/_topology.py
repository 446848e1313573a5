"""What a topology is: when and how the set of active weights changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import optax

from agent_optax.sparsity._layer import Layer, Target


class Topology:
    """Which weights are active: `static()`, `set_()`, `rigl()`, ... A subclass overrides what differs."""

    is_static = False  # whether the set of active weights never changes
    keeps_counts = True  # whether the number of active weights of a layer never changes
    is_layerwise = True  # whether one layer's update needs no other layer
    counts_jointly = False  # whether active weights of different layers are traded for each other
    supports_groups = True  # whether it keeps a fixed number of active weights in groups of them
    supports_blocks = True  # whether it can work on blocks as it does on weights
    initial_sparsity: float | None = None  # of the start masks, if it is not the final sparsity

    @property
    def interval(self) -> int:
        """Steps between topology updates; `sparsify` may spread the layers over them."""
        raise NotImplementedError

    def storage(self) -> Any:
        """The `Storage` that this topology brings along, for weights that others do not have; None for any storage."""
        return None

    def init(self, params: optax.Params, masks: Any, targets: Sequence[Target]) -> Any:
        """The topology's own state; `targets` in the order of the pruned leaves."""
        del params, masks, targets
        return ()

    def observe(self, state: Any, grads: optax.Updates, params: optax.Params) -> Any:
        """The state after the dense gradients of a step, taken at these parameters."""
        del grads, params
        return state

    def momenta(self, state: Any, num_layers: int) -> list[jax.Array | None]:
        """The moving average of the dense gradients of each layer, if the state keeps one."""
        del state
        return [None] * num_layers

    def statistics(self, state: Any, num_layers: int) -> list[jax.Array | None]:
        """What a `RunningScore` keeps of each leaf, if the state holds it."""
        del state
        return [None] * num_layers

    def is_due(self, step: jax.Array) -> jax.Array:
        """Whether the topology changes at this step, counted from 1."""
        raise NotImplementedError

    def rewire_layer(self, layer: Layer, step: jax.Array, key: jax.Array) -> jax.Array:
        """The new mask of a layer, if the topology is layerwise."""
        raise NotImplementedError

    def rewire(
        self, layers: Sequence[Layer], state: Any, step: jax.Array, key: jax.Array
    ) -> tuple[list[jax.Array], Any]:
        """The new mask of each layer and the new state, if the topology is not layerwise."""
        raise NotImplementedError
