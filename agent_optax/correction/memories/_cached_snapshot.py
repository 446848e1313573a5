"""The snapshot memory that keeps each batch's gradient, so that a step needs one gradient and not two."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from agent_optax._tree import conform, statistics_dtype, zero_like
from agent_optax.correction._memory import MemoryState, Recalled
from agent_optax.correction.coefficients._loss_regression import LossRegression, loss_regression
from agent_optax.correction.memories._rows import current_row, empty_rows, take_row


def moved(new: optax.Params, old: optax.Params) -> optax.Params:
    """`new` in place of `old`: the same leaves hidden, the same dtypes."""
    return jax.tree.map(lambda n, o: n.astype(o.dtype), conform(new, old), old)


class _CachedSnapshotFields(NamedTuple):
    snapshot: optax.Params  # like params: theta~, the parameters at the last refresh
    mean_grads: optax.Updates  # like params: g~, the mean gradient at theta~
    cached_grads: optax.Updates  # like params with a leading axis [N]: the gradient of each batch at theta~
    cached_losses: jax.Array  # float [N]: the loss of each batch at theta~; zero before the first refresh
    num_refreshes: jax.Array  # int32 []: how often the snapshot has moved


class CachedSnapshotState(_CachedSnapshotFields, MemoryState):
    """State of `snapshot` with `cached_batches`; N is their number."""

    __slots__ = ()

    @property
    def is_refreshed(self) -> jax.Array:
        """Whether mean_grads has been measured."""
        return self.num_refreshes > 0

    def recall(self, grads: optax.Updates, extra_args: Mapping[str, Any]) -> Recalled:
        """The gradient of this batch at the snapshot, and the mean gradient there."""
        del grads
        num_batches = self.num_cached_batches()
        index, is_row = current_row(extra_args, num_batches, f"snapshot(cached_batches={num_batches})")
        return Recalled(
            old_grads=take_row(self.cached_grads, index),
            mean_grads=self.mean_grads,
            is_known=self.is_refreshed & is_row,
            updated_by_refresh=True,
        )

    def num_cached_batches(self) -> int:
        """The number of batches that a refresh pass must have."""
        return self.cached_losses.shape[0]

    def refresh_point(self) -> optax.Params:
        """The snapshot."""
        return self.snapshot

    def refreshed(
        self, params: optax.Params, mean_grads: optax.Updates, batch_grads: optax.Updates, losses: jax.Array
    ) -> CachedSnapshotState:
        """The snapshot moves to `params`."""
        return CachedSnapshotState(
            snapshot=moved(params, self.snapshot),
            mean_grads=moved(mean_grads, self.mean_grads),
            cached_grads=batch_grads,
            cached_losses=losses.astype(self.cached_losses.dtype),
            num_refreshes=self.num_refreshes + 1,
        )

    def dense_fields(self) -> tuple[str, ...]:
        """The stored point keeps its old mask, so E[g_old] stays g~."""
        return ("snapshot", "mean_grads", "cached_grads")

    def point_fields(self) -> tuple[str, ...]:
        """The snapshot."""
        return ("snapshot",)


@dataclasses.dataclass(frozen=True)
class CachedSnapshot:
    """See `snapshot`."""

    cached_batches: int

    def init(self, params: optax.Params) -> CachedSnapshotState:
        """Starts at `params` with no gradient: nothing is corrected before the first refresh."""
        return CachedSnapshotState(
            snapshot=jax.tree.map(jnp.copy, params),
            mean_grads=jax.tree.map(jnp.zeros_like, params),
            cached_grads=empty_rows(params, self.cached_batches),
            cached_losses=jnp.broadcast_to(zero_like(params, statistics_dtype(params)), (self.cached_batches,)),
            num_refreshes=zero_like(params, jnp.int32),
        )

    def remember(
        self,
        memory_state: CachedSnapshotState,
        recalled: Recalled,
        grads: optax.Updates,
        corrected: optax.Updates,
        params: optax.Params | None,
        extra_args: Mapping[str, Any],
    ) -> CachedSnapshotState:
        """A step leaves the snapshot alone; only `refresh` moves it."""
        del recalled, grads, corrected, params, extra_args
        return memory_state

    def default_coefficient(self) -> LossRegression:
        """The paper's coefficient."""
        return loss_regression()
