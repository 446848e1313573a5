"""The snapshot memory: SVRG's and AGENT's old gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from agent_optax._tree import zero_like
from agent_optax._validation import check_positive_int
from agent_optax.correction._memory import MemoryState, Recalled, required_old_grads
from agent_optax.correction.coefficients._loss_regression import LossRegression, loss_regression
from agent_optax.correction.memories._cached_snapshot import CachedSnapshot, moved


class _SnapshotFields(NamedTuple):
    snapshot: optax.Params  # like params: theta~, the parameters at the last refresh
    mean_grads: optax.Updates  # like params: g~, the mean gradient at theta~
    num_refreshes: jax.Array  # int32 []: how often the snapshot has moved


class SnapshotState(_SnapshotFields, MemoryState):
    """State of `snapshot`."""

    __slots__ = ()

    @property
    def is_refreshed(self) -> jax.Array:
        """Whether mean_grads has been measured."""
        return self.num_refreshes > 0

    def recall(self, grads: optax.Updates, extra_args: Mapping[str, Any]) -> Recalled:
        """The gradient of this batch at the snapshot, and the mean gradient there."""
        return Recalled(
            old_grads=required_old_grads(extra_args, "snapshot()", grads),
            mean_grads=self.mean_grads,
            is_known=self.is_refreshed,
            updated_by_refresh=True,  # with the pairs of losses of a whole pass
        )

    def evaluation_point(self) -> optax.Params:
        """The parameters at which `value_and_grads` evaluates the old gradient."""
        return self.snapshot

    def refresh_point(self) -> optax.Params:
        """The snapshot."""
        return self.snapshot

    def refreshed(
        self, params: optax.Params, mean_grads: optax.Updates, batch_grads: optax.Updates | None, losses: jax.Array
    ) -> SnapshotState:
        """The snapshot moves to `params`."""
        del batch_grads, losses
        return SnapshotState(
            snapshot=moved(params, self.snapshot),
            mean_grads=moved(mean_grads, self.mean_grads),
            num_refreshes=self.num_refreshes + 1,
        )

    def dense_fields(self) -> tuple[str, ...]:
        """The stored point keeps its old mask, so E[g_old] stays g~."""
        return ("snapshot", "mean_grads")

    def point_fields(self) -> tuple[str, ...]:
        """The snapshot."""
        return ("snapshot",)


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """See `snapshot`."""

    def init(self, params: optax.Params) -> SnapshotState:
        """Starts at `params` with no mean gradient: nothing is corrected before the first refresh."""
        return SnapshotState(
            snapshot=jax.tree.map(jnp.copy, params),
            mean_grads=jax.tree.map(jnp.zeros_like, params),
            num_refreshes=zero_like(params, jnp.int32),
        )

    def remember(
        self,
        memory_state: SnapshotState,
        recalled: Recalled,
        grads: optax.Updates,
        corrected: optax.Updates,
        params: optax.Params | None,
        extra_args: Mapping[str, Any],
    ) -> SnapshotState:
        """A step does not move the snapshot; only `refresh` does."""
        del recalled, grads, corrected, params, extra_args
        return memory_state

    def default_coefficient(self) -> LossRegression:
        """The paper's coefficient."""
        return loss_regression()


def snapshot(cached_batches: int | None = None) -> Snapshot | CachedSnapshot:
    r"""The memory of SVRG and of AGENT (Algorithm 1): a snapshot of the parameters and the mean gradient there.

    .. math::
        g_{old} = \nabla \ell(B_t | \tilde\theta), \qquad
        g_{mean} = \tilde g = \frac1N \sum_i \nabla \ell(x_i | \tilde\theta)

    A step needs a second gradient: `update` takes it as the extra argument ``old_grads=``, which
    `agent_optax.value_and_grads` computes. `agent_optax.refresh`, once an epoch, moves the snapshot to the current
    parameters; until the first refresh nothing is corrected. The state holds two copies of the parameters.

    With `cached_batches` the refresh pass keeps the gradient and the loss of each of its batches, and a step needs one
    gradient only: `update` takes the position of its batch in that pass as the extra argument ``batch_index=``, an
    int or a traced integer scalar. The estimate is the same, provided that batches are the same in each epoch, in any
    order, with no random augmentation or dropout; a traced index out of range corrects nothing. The refresh pass need
    not evaluate losses at the old snapshot either. The state grows by one gradient a batch.

    Args:
        cached_batches: the number of batches of an epoch, and of each refresh pass; None (default) caches nothing.

    Returns:
        A memory for `agent_optax.correct_gradients`.

    Raises:
        ValueError: if `cached_batches` is not a positive whole number; from `update`, if ``old_grads`` or
            ``batch_index`` is missing, or ``batch_index`` is known to be out of range; from `agent_optax.refresh`, if
            the pass has another number of batches.

    Example:
        >>> import agent_optax, jax, jax.numpy as jnp, optax
        >>> tx = optax.chain(agent_optax.correct_gradients(memory=agent_optax.snapshot()), optax.sgd(0.1))

        One gradient a step, with the gradients of the refresh pass kept:

        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch @ params) ** 2)
        >>> memory = agent_optax.snapshot(cached_batches=4)
        >>> tx = agent_optax.correct_gradients(memory, agent_optax.constant(1.0), scaling=1.0)
        >>> params, batches = jnp.ones(3), jax.random.normal(jax.random.key(0), (4, 8, 3))
        >>> opt_state = agent_optax.refresh(loss_fn, params, tx.init(params), batches)
        >>> (value, grads), extras = agent_optax.value_and_grads(loss_fn)(params, opt_state, batches[2])
        >>> sorted(extras)
        ['value']
        >>> estimate, opt_state = tx.update(grads, opt_state, params, batch_index=2, **extras)

    References:
        Johnson & Zhang, Accelerating Stochastic Gradient Descent using Predictive Variance Reduction, NeurIPS 2013.
        Lei et al., Balance is Essence, CPAL 2024 (https://arxiv.org/abs/2301.03573).
    """
    if cached_batches is None:
        return Snapshot()
    check_positive_int("cached_batches", cached_batches, "it is the number of batches of an epoch; None caches nothing")
    return CachedSnapshot(cached_batches)
