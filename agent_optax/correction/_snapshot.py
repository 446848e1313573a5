"""The snapshot memory: SVRG's and AGENT's old gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from agent_optax._tree import conform
from agent_optax.correction._loss_regression import LossRegression, loss_regression
from agent_optax.correction._memory import Recalled, required


class SnapshotState(NamedTuple):
    """State of `snapshot`."""

    snapshot: optax.Params  # like params: theta~, the parameters at the last refresh
    mean_grads: optax.Updates  # like params: g~, the mean gradient at theta~
    is_refreshed: jax.Array  # bool []: whether mean_grads has been measured

    def recall(self, grads: optax.Updates, extra_args: Mapping[str, Any]) -> Recalled:
        """The gradient of this batch at the snapshot, and the mean gradient there."""
        return Recalled(
            old_grads=conform(required(extra_args, "old_grads", "snapshot()"), grads),
            mean_grads=self.mean_grads,
            is_known=self.is_refreshed,
            old_loss=None,  # refresh feeds all pairs of a pass at once
        )

    def evaluation_point(self) -> optax.Params:
        """The parameters at which `value_and_grads` evaluates the old gradient."""
        return self.snapshot

    def refreshed(self, params: optax.Params, mean_grads: optax.Updates) -> SnapshotState:
        """The snapshot moves to `params`."""

        def moved(new: optax.Params, old: optax.Params) -> optax.Params:
            return jax.tree.map(lambda n, o: n.astype(o.dtype), conform(new, old), old)

        return SnapshotState(
            snapshot=moved(params, self.snapshot),
            mean_grads=moved(mean_grads, self.mean_grads),
            is_refreshed=jnp.ones_like(self.is_refreshed),
        )

    def after_growth(self, reset: SnapshotState) -> SnapshotState:
        """Dense storage: nothing changes. The snapshot keeps its old mask, so that E[g_old] stays g~."""
        del reset
        return self

    def after_move(self, moved: SnapshotState) -> SnapshotState:
        """Compact storage: the mean gradient follows the active weights, the snapshot keeps its old ones."""
        return moved._replace(snapshot=self.snapshot)


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """See `snapshot`."""

    def init(self, params: optax.Params) -> SnapshotState:
        """Starts at `params` with no mean gradient: nothing is corrected before the first refresh."""
        return SnapshotState(
            snapshot=jax.tree.map(jnp.copy, params),
            mean_grads=jax.tree.map(jnp.zeros_like, params),
            is_refreshed=jnp.asarray(False),
        )

    def remember(
        self,
        memory_state: SnapshotState,
        grads: optax.Updates,
        corrected: optax.Updates,
        params: optax.Params | None,
        extra_args: Mapping[str, Any],
    ) -> SnapshotState:
        """A step leaves the snapshot alone; only `refresh` moves it."""
        del grads, corrected, params, extra_args
        return memory_state

    def default_coefficient(self) -> LossRegression:
        """The paper's coefficient."""
        return loss_regression()


def snapshot() -> Snapshot:
    r"""The memory of SVRG and of AGENT (Algorithm 1): a snapshot of the parameters and the mean gradient there.

    .. math::
        g_{old} = \nabla \ell(B_t | \tilde\theta), \qquad
        g_{mean} = \tilde g = \frac1N \sum_i \nabla \ell(x_i | \tilde\theta)

    A step needs a second gradient: `update` takes it as the extra argument ``old_grads=``, which
    `agent_optax.value_and_grads` computes. `agent_optax.refresh`, once an epoch, moves the snapshot to the current
    parameters; until the first refresh nothing is corrected. The state holds two copies of the parameters.

    Returns:
        A memory for `agent_optax.correct_gradients`.

    Example:
        >>> import agent_optax, optax
        >>> tx = optax.chain(agent_optax.correct_gradients(memory=agent_optax.snapshot()), optax.sgd(0.1))

    References:
        Johnson & Zhang, Accelerating Stochastic Gradient Descent using Predictive Variance Reduction, NeurIPS 2013.
        Lei et al., Balance is Essence, CPAL 2024 (https://arxiv.org/abs/2301.03573).
    """
    return Snapshot()
