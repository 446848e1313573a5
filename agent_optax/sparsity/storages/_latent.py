"""Latent storage: every position keeps a weight, and the network has those that are connected."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from agent_optax._tree import all_finite, conform, is_masked
from agent_optax.correction._find import find_corrections
from agent_optax.sparsity._rewiring import num_nonzero_inactive, when
from agent_optax.sparsity._sparse_optimizer import SparseOptimizer
from agent_optax.sparsity._start import Start
from agent_optax.sparsity._state import SparsifyState, apply_masks, large_total, total
from agent_optax.sparsity._storage import ActiveWeights, Storage
from agent_optax.sparsity.selection._top_k import random_scores


class _LatentFields(NamedTuple):
    is_connected: Any  # like params, bool; MaskedNode where nothing is pruned
    signs: Any  # like params, int8: 1 or -1, fixed
    latent_weights: Any  # like params: what the parameters do not hold; zero where they do
    point_masks: Any  # like params, bool: connected at the stored point of evaluation; None without such a memory
    ever_active: Any  # like params, bool


class LatentActive(_LatentFields, ActiveWeights):
    """The active weights, and the latent weights of inactive positions."""

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
        """Corrections store whole arrays; a disconnected weight has no gradient."""
        return apply_masks(self.is_connected, tree)

    def scatter_point(self, tree: Any, params: Any) -> Any:
        """The weights of the network at the stored point."""
        del params
        return tree if self.point_masks is None else apply_masks(self.point_masks, tree)

    def step_args(
        self, grads: optax.Updates, params: optax.Params, extra_args: dict[str, Any]
    ) -> tuple[optax.Updates, dict[str, Any]]:
        """Zeros where a weight is disconnected; a weight connected at the stored point is corrected in either case."""
        args = dict(extra_args)
        if self.point_masks is not None and args.get("old_grads") is not None:
            args["old_grads"] = apply_masks(self.point_masks, conform(args["old_grads"], params))
        return apply_masks(self.is_connected, grads), args

    def points_moved(self) -> LatentActive:
        """The stored point is the current parameters."""
        return self if self.point_masks is None else self._replace(point_masks=self.is_connected)


class LatentTopology(Protocol):
    """What `Latent` must know of its topology."""

    new_weight: float  # the latent weight of a new connection

    def noise_std(self, step: jax.Array) -> jax.Array:
        """The standard deviation of the noise on connected weights at this step, counted from 1."""
        ...

    def num_connections(self, topology_state: Any) -> jax.Array:
        """int32 []: the number of connections to which every step fills up."""
        ...

    def grown(self, connected: Sequence[jax.Array], num_missing: jax.Array, key: jax.Array) -> list[jax.Array]:
        """Masks of new connections, `num_missing` in all."""
        ...


@dataclasses.dataclass(frozen=True)
class Latent(Storage):
    """Keeps a weight for every position, connected while it has its sign; see `bayesian_rewiring`."""

    topology: LatentTopology

    def check(self, optimizer: SparseOptimizer) -> None:
        """Growth is random."""
        if optimizer.grow_by == "corrected":
            raise ValueError(f"grow_by='corrected' has no meaning for {optimizer.topology}, which grows at random.")

    def start(
        self, optimizer: SparseOptimizer, start: Start, params: optax.Params, key: jax.Array
    ) -> tuple[LatentActive, optax.OptState]:
        """Signs are those of the parameters, random where one is zero."""
        masks = start.masks
        inner_state = optimizer.inner.init(apply_masks(masks, params))
        has_point = any(correction.memory_state.point_fields() for correction in find_corrections(inner_state))
        keys = iter(jax.random.split(jax.random.fold_in(key, 2), max(len(jax.tree.leaves(masks)), 1)))

        def sign(mask: Any, p: jax.Array) -> Any:
            if is_masked(mask):
                return mask
            is_negative = jnp.where(p == 0, random_scores(next(keys), p) % 2 == 0, p < 0)
            return jnp.where(is_negative, -1, 1).astype(jnp.int8)

        active = LatentActive(
            is_connected=masks,
            signs=jax.tree.map(sign, masks, params, is_leaf=is_masked),
            latent_weights=jax.tree.map(
                lambda m, p: m if is_masked(m) else jnp.zeros_like(p), masks, params, is_leaf=is_masked
            ),
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
        pruned = [i for i, m in enumerate(leaf(connected)) if not is_masked(m)]
        pick = lambda tree: [leaf(tree)[i] for i in pruned]  # noqa: E731

        is_own = jax.tree.map(lambda m, v: m & (v == 0), connected, active.latent_weights)
        extended = _where(is_own, params, active.latent_weights)
        seen, args = active.step_args(grads, params, extra_args)
        inner_updates, inner_state = optimizer.inner.update(seen, state.inner_state, extended, **args)
        if any(correction.memory_state.moves_every_step() for correction in find_corrections(inner_state)):
            active = active.points_moved()

        next_key, noise_key, growth_key = jax.random.split(jax.random.wrap_key_data(state.topology_key), 3)
        std = topology.noise_std(state.topology_step)
        noise_keys = jax.random.split(noise_key, max(len(pruned), 1))
        before, steps, moved = pick(connected), [], []
        for k, (mask, u, v) in enumerate(zip(before, pick(inner_updates), pick(extended), strict=True)):
            noise = std.astype(v.dtype) * jax.random.normal(noise_keys[k], v.shape, v.dtype)
            # The sum is decided on here and computed again when the update is applied: without the barrier XLA might
            # contract one of the two to a fused multiply-add, and round differently about zero.
            steps.append(jax.lax.optimization_barrier(u.astype(v.dtype) + jnp.where(mask, noise, 0)))
            moved.append(v + steps[-1])

        usable = all_finite((grads, moved))
        signs = [s.astype(v.dtype) for s, v in zip(pick(active.signs), moved, strict=True)]
        after = [jnp.where(usable, v * s > 0, old) for v, s, old in zip(moved, signs, before, strict=True)]
        num_connected = total([jnp.sum(m, dtype=jnp.int32) for m in after])
        num_missing = jnp.where(usable, topology.num_connections(state.topology_state) - num_connected, 0)

        def grow(masks: list[jax.Array]) -> list[jax.Array]:
            grown = topology.grown(masks, jnp.maximum(num_missing, 0), growth_key)
            return [m | g for m, g in zip(masks, grown, strict=True)]

        survivors = after
        after = when(num_missing > 0, grow, after)
        updates, latents = list(leaf(inner_updates)), list(leaf(active.latent_weights))
        for k, i in enumerate(pruned):
            p, own = leaf(params)[i], leaf(is_own)[i]
            start = signs[k] * max(topology.new_weight, float(jnp.finfo(p.dtype).smallest_normal))
            new = jnp.where(after[k] & ~survivors[k], start, moved[k])
            # A weight that left and came back in one step is 0 for a step: no update takes p to 1e-12 without rounding.
            in_network = after[k] & ~(before[k] & ~survivors[k]) & usable
            # A weight that stays gets its step, so that adding it rounds once; others move from p.
            updates[i] = jnp.where(own & survivors[k], steps[k], jnp.where(in_network, new, 0) - p)
            latents[i] = jnp.where(usable, jnp.where(in_network, 0, new), latents[i])
        masks = list(leaf(connected))
        for k, i in enumerate(pruned):
            masks[i] = after[k]
        masks = structure.unflatten(masks)
        pairs = list(zip(after, before, strict=True))
        made = usable.astype(jnp.int32)
        return structure.unflatten(updates), state._replace(
            inner_state=inner_state,
            active_weights=active._replace(
                is_connected=masks,
                latent_weights=structure.unflatten(latents),
                ever_active=jax.tree.map(jnp.logical_or, active.ever_active, masks),
            ),
            topology_key=jax.random.key_data(next_key),
            num_dropped=total([jnp.sum(old & ~new, dtype=jnp.int32) for new, old in pairs]),
            num_grown=total([jnp.sum(new & ~old, dtype=jnp.int32) for new, old in pairs]),
            num_nonzero_inactive=num_nonzero_inactive(connected, params),
            num_topology_updates=state.num_topology_updates + made,
            num_skipped_updates=state.num_skipped_updates + (1 - made),
        )


def _where(masks: Any, chosen: Any, other: Any) -> Any:
    return jax.tree.map(
        lambda m, c, o: c if is_masked(m) else jnp.where(m, c, o), masks, chosen, other, is_leaf=is_masked
    )
