"""The state of a sparse optimizer, and what can be read off it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from agent_optax._tree import is_masked


class SparsifyState(NamedTuple):
    """State of `sparsify` with dense storage. Masks are MaskedNode where nothing is pruned."""

    inner_state: optax.OptState  # of the inner optimizer
    masks: Any  # like params, bool: the active weights
    ever_active: Any  # like masks: active at any time so far; None when the topology is static
    topology_key: jax.Array  # uint32 [2]: key data
    topology_step: jax.Array  # int32 []: steps taken
    num_dropped: jax.Array  # int32 []: weights that became inactive in the last topology update
    num_grown: jax.Array  # int32 []: weights that became active in it
    num_topology_updates: jax.Array  # int32 []: topology updates made
    num_skipped_updates: jax.Array  # int32 []: topology updates left out for a non-finite gradient or weight

    def active_masks(self, params: optax.Params) -> Any:
        """The masks, whatever the storage."""
        del params
        return self.masks


def mask_counts(masks: Any) -> tuple[jax.Array, int]:
    """The number of active weights, and of all weights, of the pruned leaves."""
    leaves = jax.tree.leaves(masks)
    return sum((jnp.sum(m, dtype=jnp.int32) for m in leaves), jnp.zeros((), jnp.int32)), sum(m.size for m in leaves)


def apply_masks(masks: Any, params: optax.Params) -> optax.Params:
    """Exact zeros where a mask is False."""
    return jax.tree.map(
        lambda mask, p: p if is_masked(mask) else jnp.where(mask, p, jnp.zeros_like(p)),
        masks,
        params,
        is_leaf=is_masked,
    )


def find_sparsify(opt_state: optax.OptState) -> list[SparsifyState]:
    """All sparse optimizers in a state."""

    def is_sparsify(node: Any) -> bool:
        return isinstance(node, SparsifyState)

    return [node for node in jax.tree.leaves(opt_state, is_leaf=is_sparsify) if is_sparsify(node)]
