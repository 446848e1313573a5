"""The state of a correction, with the one formula."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from agent_optax.correction._memory import Recalled


class CorrectGradientsState(NamedTuple):
    """State of `correct_gradients`."""

    memory_state: Any  # the state of the memory, such as SnapshotState or HistoryState
    coefficient_state: Any  # the state of the coefficient, such as LossRegressionState
    correction_scaling: jax.Array  # float []: gamma

    def correct(self, grads: optax.Updates, recalled: Recalled) -> optax.Updates:
        """Equation (2)."""
        leaves, treedef = jax.tree.flatten(grads)
        weights = treedef.unflatten([self.correction_scaling * c for c in self.coefficient_state.per_leaf(len(leaves))])

        def corrected(g: jax.Array, w: jax.Array, old: jax.Array, mean: jax.Array) -> jax.Array:
            correction = w.astype(g.dtype) * (old - mean).astype(g.dtype)
            return g - jnp.where(recalled.is_known, correction, 0)

        return jax.tree.map(corrected, grads, weights, recalled.old_grads, recalled.mean_grads)

    def correction_weight(self) -> jax.Array:
        """The weight w = gamma c."""
        return self.correction_scaling * self.coefficient_state.correlation

    def variance_ratio(self) -> jax.Array:
        """The coefficient's estimate of Var(g^) / Var(g_new)."""
        return self.coefficient_state.variance_ratio(self.correction_scaling)
