"""Compact storage: the inner optimizer sees the active entries only."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from agent_optax._tree import is_masked
from agent_optax.correction._find import find_corrections
from agent_optax.sparsity._equal_layers import in_one_program, map_layers
from agent_optax.sparsity._pruned_leaf import PrunedLeaf
from agent_optax.sparsity._rewiring import when
from agent_optax.sparsity._sparse_optimizer import SparseOptimizer
from agent_optax.sparsity._start import Start
from agent_optax.sparsity._state import SparsifyState, apply_masks
from agent_optax.sparsity._storage import Storage
from agent_optax.sparsity.storages._compact_active import (
    CompactActive,
    entry_rows,
    pack_bits,
    positions_of,
    set_rows,
    warn_if_gathered,
)
from agent_optax.sparsity.storages._compact_check import check_on_entries
from agent_optax.sparsity.storages._compact_rewiring import compact_rewire
from agent_optax.sparsity.storages._forward_only import forward_only
from agent_optax.sparsity.storages._shards import parts_of
from agent_optax.sparsity.storages._sparse_update import EntryUpdates, SparseUpdate


@dataclasses.dataclass(frozen=True)
class Compact(Storage):
    """See `sparsify`: ``storage="compact"``."""

    updates: str = "arrays"  # or "sparse"
    needs_counts = True

    def check(self, optimizer: SparseOptimizer) -> None:
        """Counts must stay, and growth can see nothing but the raw gradient."""
        if optimizer.grow_by == "corrected":
            raise ValueError(
                "grow_by='corrected' needs the corrected gradient of inactive weights, which storage='compact' does "
                "not hold: use grow_by='raw' or storage='dense'."
            )
        if not optimizer.topology.keeps_counts:
            raise ValueError(
                "storage='compact' needs layers that keep their number of active weights, and "
                f"{optimizer.topology} changes it: use storage='dense'."
            )

    def start(
        self, optimizer: SparseOptimizer, start: Start, params: optax.Params, key: jax.Array
    ) -> tuple[CompactActive, optax.OptState]:
        """The positions of the masks, and the initial state of their entries."""
        del key
        pruned = optimizer.pruned_leaves(params, start.masks)
        counts = jax.tree.structure(params).flatten_up_to(start.counts)
        _check_counts(pruned, counts, optimizer.topology.is_static)
        warn_if_gathered(params, pruned)
        packed = jax.tree.map(lambda mask: pack_bits(mask, parts_of(mask)), start.masks)

        masks, treedef = jax.tree.flatten(start.masks)
        counts = tuple(jax.tree.leaves(start.counts))
        indices = in_one_program(_positions, counts, jax.tree.leaves(packed), masks)
        active = CompactActive(
            indices=treedef.unflatten(indices),
            point_indices=None,
            is_uncorrected=None,
            ever_active=None if optimizer.topology.is_static else packed,
        )
        check_on_entries(optimizer, params, params, None, pruned, active.indices)
        inner_state = optimizer.inner.init(active.gather(apply_masks(start.masks, params)))
        if any(correction.memory_state.point_fields() for correction in find_corrections(inner_state)):
            active = active._replace(
                point_indices=jax.tree.map(jnp.copy, active.indices),
                is_uncorrected=jax.tree.map(lambda i: jnp.zeros_like(i, dtype=bool), active.indices),
            )
        return active, inner_state

    def update(
        self,
        optimizer: SparseOptimizer,
        grads: optax.Updates,
        state: SparsifyState,
        params: optax.Params,
        extra_args: dict[str, Any],
    ) -> tuple[optax.Updates, SparsifyState]:
        """One step on the active entries; then, if due, the topology update on what comes of it."""
        active: CompactActive = state.active_weights
        pruned = optimizer.pruned_leaves(params, active.indices)
        check_on_entries(optimizer, grads, params, extra_args, pruned, active.indices)
        positions = active.indices
        if not optimizer.topology.is_static:
            positions = _copies(positions, state.topology_step)
        entries, args = active.step_args(grads, params, extra_args)
        updates, inner_state = optimizer.inner.update(entries, state.inner_state, active.gather(params), **args)
        if any(correction.memory_state.moves_every_step() for correction in find_corrections(inner_state)):
            active = active.points_moved()
        state = state._replace(inner_state=inner_state, active_weights=active)
        rows = jax.tree.map(lambda i, u: i if is_masked(i) else entry_rows(u, i), positions, updates, is_leaf=is_masked)
        if not optimizer.topology.is_static:

            def rewire(carry: Any) -> Any:
                state, rows, positions = carry
                copies = _copies(positions, state.topology_step)
                return (*compact_rewire(optimizer, pruned, state, rows, params, grads), copies)

            due = jnp.any(optimizer.layers_due(state.topology_step, len(pruned)))
            state, rows, positions = forward_only(when(due, rewire, (state, rows, positions)))
        return self._as_updates(positions, rows, updates, params), state

    def _as_updates(self, positions: Any, rows: Any, updates: Any, params: Any) -> Any:
        """Arrays like params, -p where weights are inactive; or the entries alone."""

        def of_leaf(i: Any, values: Any, u: Any, p: Any) -> Any:
            if is_masked(i):
                return u
            if self.updates == "sparse":
                return EntryUpdates(i, values)
            return set_rows(i, values, -p.astype(values.dtype))

        return jax.tree.map(of_leaf, positions, rows, updates, params, is_leaf=is_masked)

    def present(self, updates: Any) -> Any:
        """Entries as objects that add themselves to a parameter."""

        def is_entries(node: Any) -> bool:
            return isinstance(node, EntryUpdates)

        return jax.tree.map(lambda u: SparseUpdate(u) if is_entries(u) else u, updates, is_leaf=is_entries)


def _positions(counts: tuple[int, ...], packed: list[jax.Array], masks: list[jax.Array]) -> list[jax.Array]:
    """The positions of the set bits of each leaf."""

    def positions(count: int, layer: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, tuple[()]]:
        bits, mask = layer
        num_parts = bits.size // max(bits.shape[-1], 1)
        return positions_of(bits, min(count, mask.size // num_parts)), ()

    return map_layers(positions, counts, list(zip(packed, masks, strict=True)))[0]


def _check_counts(pruned: Sequence[PrunedLeaf], counts: Sequence[Any], is_static: bool) -> None:
    """Raises ValueError where a pattern does not fix the number of active weights."""
    for leaf in pruned:
        pattern, shape = leaf.pattern, leaf.layer_shape
        depends = pattern.num_entries(shape, pattern.step(shape)) is None
        if counts[leaf.index] is None or (depends and not is_static):
            raise ValueError(
                f"storage='compact' fixes the number of active weights, and with pattern={pattern} that of "
                f"{leaf.name}, of shape {leaf.shape}, depends on which blocks are active, because those at the end of "
                "an axis are smaller: use blocks that divide their axes, or storage='dense'."
            )
        if not pattern.keeps_counts and not is_static:
            raise ValueError(
                f"storage='compact' fixes the number of active weights, and ablation in pattern={pattern} changes that "
                f"of {leaf.name}: use storage='dense'."
            )


def _copies(indices: Any, step: jax.Array) -> Any:
    """Equal indices, in arrays of their own.

    The update is at the old positions, also when a topology update has changed those in the state: the loop around it
    must not change them. XLA would copy them, on one core and twice, because it keeps old and new in one array until
    the end. That an addition adds zero it does not know: so the sum is a second array from the start, and both go
    through the loop in place. A test counts the copies.
    """
    zero = jnp.minimum(step, 0)
    return jax.tree.map(lambda i: i + zero, indices)
