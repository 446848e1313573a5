"""Latent storage: every position keeps a weight, and the network has those that are connected."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from agent_optax._tree import all_finite, conform, is_masked
from agent_optax.correction._find import find_corrections
from agent_optax.sparsity._pruned_leaf import PrunedLeaf
from agent_optax.sparsity._rewiring import num_nonzero_inactive, when
from agent_optax.sparsity._sparse_optimizer import SparseOptimizer
from agent_optax.sparsity._start import Start
from agent_optax.sparsity._state import SparsifyState, apply_masks, large_total, total
from agent_optax.sparsity._storage import ActiveWeights, Storage
from agent_optax.sparsity._topology import Topology
from agent_optax.sparsity.selection._top_k import num_true


class _LatentFields(NamedTuple):
    is_connected: Any  # like params, bool; MaskedNode where nothing is pruned
    signs: Any  # like params, int8: 1 or -1, fixed; None where weights may change their sign
    latent_weights: Any  # like params: what the parameters do not hold; zero where they do
    point_masks: Any  # like params, bool: connected at the stored point of evaluation; None without such a memory
    ever_active: Any  # like params, bool


class LatentActive(_LatentFields, ActiveWeights):
    """The active weights, and the latent weights of inactive positions.

    With fixed signs a disconnected weight has no gradient; without them gradients go straight through the masks.
    """

    __slots__ = ()

    def masks(self, params: optax.Params | None = None) -> Any:
        """True where a weight is active."""
        del params
        return self.is_connected

    def num_active(self) -> jax.Array:
        """The number of active weights."""
        return large_total(jax.tree.map(lambda m: jnp.sum(m, dtype=jnp.int32), self.is_connected))

    def num_ever_active(self) -> jax.Array:
        """The number of weights that were ever active."""
        return large_total(jax.tree.map(lambda m: jnp.sum(m, dtype=jnp.int32), self.ever_active))

    def gather(self, tree: Any) -> Any:
        """Corrections store whole arrays, with zeros where there is no gradient."""
        return tree if self.signs is None else apply_masks(self.is_connected, tree)

    def scatter_point(self, tree: Any, params: Any) -> Any:
        """The weights of the network at the stored point."""
        del params
        return tree if self.point_masks is None else apply_masks(self.point_masks, tree)

    def step_args(
        self, grads: optax.Updates, params: optax.Params, extra_args: dict[str, Any]
    ) -> tuple[optax.Updates, dict[str, Any]]:
        """Zeros where there is no gradient; a weight connected at the stored point is corrected in either case."""
        if self.signs is None:
            return grads, extra_args
        args = dict(extra_args)
        if self.point_masks is not None and args.get("old_grads") is not None:
            args["old_grads"] = apply_masks(self.point_masks, conform(args["old_grads"], params))
        return apply_masks(self.is_connected, grads), args

    def points_moved(self) -> LatentActive:
        """The stored point is the current parameters."""
        return self if self.point_masks is None else self._replace(point_masks=self.is_connected)


class LatentStep(NamedTuple):
    """What a step has made of the pruned leaves, before it is decided which are connected; lists in their order."""

    connected: list[jax.Array]  # bool: before the step
    weights: list[jax.Array]  # after it, of all positions
    grads: list[jax.Array]
    signs: list[jax.Array]  # int8: 1 or -1; empty where they may change
    ever_active: list[jax.Array]
    is_usable: jax.Array  # bool []: whether weights and gradients are finite


class Reconnected(NamedTuple):
    """What is connected after a step."""

    connected: list[jax.Array]
    survivors: list[jax.Array]  # of those connected before the step; others may be connected again at once
    weights: list[jax.Array]  # of all positions: new ones may start elsewhere
    is_due: jax.Array  # bool []: whether it was a topology update, or would have been with finite numbers


class LatentTopology(Topology):
    """A topology under which every position keeps a weight, connected or not. A subclass overrides what differs."""

    keeps_counts = False
    is_layerwise = False

    def storage(self) -> Latent:
        """The one that keeps them."""
        return Latent(self)

    def start_masks(
        self, optimizer: SparseOptimizer, start: Start, params: optax.Params, pruned: Sequence[PrunedLeaf]
    ) -> Any:
        """The masks with which training starts."""
        del optimizer, params, pruned
        return start.masks

    def start_signs(self, masks: Any, params: optax.Params, key: jax.Array) -> Any:
        """The signs that weights keep; None if they may change them."""
        del masks, params, key

    def latent_grads(self, masks: Any, grads: optax.Updates, weights: optax.Params) -> optax.Updates:
        """What the inner optimizer gets: gradients at all positions."""
        del masks, weights
        return grads

    def noise(self, step: jax.Array, mask: jax.Array, weights: jax.Array, key: jax.Array) -> jax.Array | None:
        """What is added to the update of a leaf."""
        del step, mask, weights, key
        return None

    def reconnect(
        self,
        optimizer: SparseOptimizer,
        pruned: Sequence[PrunedLeaf],
        state: SparsifyState,
        latent: LatentStep,
        key: jax.Array,
    ) -> Reconnected:
        """Which positions are connected now."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Latent(Storage):
    """Keeps a weight for every position: the parameters hold those of connected ones, the state the others."""

    topology: LatentTopology

    def check(self, optimizer: SparseOptimizer) -> None:
        """Growth is by weights, or random."""
        if optimizer.grow_by == "corrected":
            raise ValueError(
                f"grow_by='corrected' has no meaning for {optimizer.topology}, which grows at random or by weights "
                "that all positions keep: use grow_by='raw'."
            )

    def start(
        self, optimizer: SparseOptimizer, start: Start, params: optax.Params, key: jax.Array
    ) -> tuple[LatentActive, optax.OptState]:
        """The weights of all positions are those of the parameters, or zero where only connected ones move."""
        pruned = optimizer.pruned_leaves(params, start.masks)
        masks = self.topology.start_masks(optimizer, start, params, pruned)
        signs = self.topology.start_signs(masks, params, key)
        is_free = signs is None
        inner_state = optimizer.inner.init(params if is_free else apply_masks(masks, params))
        has_point = any(correction.memory_state.point_fields() for correction in find_corrections(inner_state))

        def latent(mask: Any, p: jax.Array) -> Any:
            if is_masked(mask):
                return mask
            return jnp.where(mask, 0, p) if is_free else jnp.zeros_like(p)

        active = LatentActive(
            is_connected=masks,
            signs=signs,
            latent_weights=jax.tree.map(latent, masks, params, is_leaf=is_masked),
            point_masks=jax.tree.map(jnp.copy, masks) if has_point else None,
            ever_active=jax.tree.map(jnp.copy, masks),
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
        """One step, and what it connects and disconnects."""
        topology = self.topology
        active: LatentActive = state.active_weights
        connected = active.is_connected
        structure = jax.tree.structure(params)
        leaf = lambda tree: structure.flatten_up_to(tree)  # noqa: E731
        pruned = optimizer.pruned_leaves(params, connected)
        pick = lambda tree: [leaf(tree)[own.index] for own in pruned]  # noqa: E731

        is_own = jax.tree.map(lambda m, v: m & (v == 0), connected, active.latent_weights)
        extended = _where(is_own, params, active.latent_weights)
        seen, args = active.step_args(grads, params, extra_args)
        seen = topology.latent_grads(connected, seen, extended)
        inner_updates, inner_state = optimizer.inner.update(seen, state.inner_state, extended, **args)
        if any(correction.memory_state.moves_every_step() for correction in find_corrections(inner_state)):
            active = active.points_moved()

        next_key, noise_key, topology_key = jax.random.split(jax.random.wrap_key_data(state.topology_key), 3)
        noise_keys = jax.random.split(noise_key, max(len(pruned), 1))
        before, steps, moved = pick(connected), [], []
        for k, (mask, u, v) in enumerate(zip(before, pick(inner_updates), pick(extended), strict=True)):
            noise = topology.noise(state.topology_step, mask, v, noise_keys[k])
            step = u.astype(v.dtype) if noise is None else u.astype(v.dtype) + noise
            # The sum is decided on here and computed again when the update is applied: without the barrier XLA might
            # contract one of the two to a fused multiply-add, and round differently about zero.
            steps.append(jax.lax.optimization_barrier(step))
            moved.append(v + steps[-1])

        usable = all_finite((grads, moved))
        signs = [] if active.signs is None else pick(active.signs)
        latent_step = LatentStep(before, moved, pick(grads), signs, pick(active.ever_active), usable)
        after = topology.reconnect(optimizer, pruned, state, latent_step, topology_key)

        updates, latents, masks = list(leaf(inner_updates)), list(leaf(active.latent_weights)), list(leaf(connected))
        for k, i in enumerate(own.index for own in pruned):
            p, own, new, survives = leaf(params)[i], leaf(is_own)[i], after.weights[k], after.survivors[k]
            # A weight that left and came back in one step is 0 for a step: no update takes p to 1e-12 without rounding.
            in_network = after.connected[k] & ~(before[k] & ~survives) & usable
            # A weight that stays gets its step, so that adding it rounds once; others move from p.
            updates[i] = jnp.where(own & survives, steps[k], jnp.where(in_network, new, 0) - p)
            latents[i] = jnp.where(usable, jnp.where(in_network, 0, new), latents[i])
            masks[i] = after.connected[k]
        masks = structure.unflatten(masks)

        def count(_: list[jax.Array]) -> list[jax.Array]:
            pairs = list(zip(after.connected, before, strict=True))
            dropped, grown = [num_true(old & ~new) for new, old in pairs], [num_true(new & ~old) for new, old in pairs]
            return [total(dropped), total(grown), num_nonzero_inactive(connected, params)]

        counts = [state.num_dropped, state.num_grown, state.num_nonzero_inactive]
        num_dropped, num_grown, num_nonzero = when(after.is_due, count, counts)
        return structure.unflatten(updates), state._replace(
            inner_state=inner_state,
            active_weights=active._replace(
                is_connected=masks,
                latent_weights=structure.unflatten(latents),
                ever_active=jax.tree.map(jnp.logical_or, active.ever_active, masks),
            ),
            topology_key=jax.random.key_data(next_key),
            num_dropped=num_dropped,
            num_grown=num_grown,
            num_nonzero_inactive=num_nonzero,
            num_topology_updates=state.num_topology_updates + (after.is_due & usable).astype(jnp.int32),
            num_skipped_updates=state.num_skipped_updates + (after.is_due & ~usable).astype(jnp.int32),
        )


def _where(masks: Any, chosen: Any, other: Any) -> Any:
    return jax.tree.map(
        lambda m, c, o: c if is_masked(m) else jnp.where(m, c, o), masks, chosen, other, is_leaf=is_masked
    )
