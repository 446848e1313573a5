"""The state of a correction, with the one formula."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from agent_optax._estimate import Estimate
from agent_optax._tree import wide_dtype
from agent_optax.correction._memory import Recalled


class CorrectGradientsState(NamedTuple):
    """State of `correct_gradients`."""

    memory_state: Any  # of the memory, a MemoryState such as SnapshotState
    coefficient_state: Any  # of the coefficient, a CoefficientState such as LossRegressionState
    correction_scaling: jax.Array  # float []: gamma

    def correct(self, grads: optax.Updates, recalled: Recalled) -> optax.Updates:
        """Equation (2)."""
        leaves, treedef = jax.tree.flatten(grads)
        weights = treedef.unflatten([self.correction_scaling * c for c in self.coefficient_state.per_leaf(len(leaves))])

        def corrected(g: jax.Array, w: jax.Array, old: jax.Array, mean: jax.Array) -> jax.Array:
            wide = wide_dtype(g.dtype)
            correction = w.astype(g.dtype) * (old.astype(wide) - mean.astype(wide)).astype(g.dtype)
            return g - jnp.where(recalled.is_known, correction, jnp.zeros_like(correction))

        return jax.tree.map(corrected, grads, weights, recalled.old_grads, recalled.mean_grads)

    def correction_weight(self) -> jax.Array:
        """The weight w = gamma c."""
        return self.correction_scaling * self.coefficient_state.correlation

    def variance_ratio(self) -> Estimate:
        """The coefficient's estimate of Var(g^) / Var(g_new)."""
        return self.coefficient_state.variance_ratio(self.correction_scaling)
