"""Flax Linen: a `TrainState` that hands the extra arguments on to the optimizer, and sparse layers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import optax
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state

from agent_optax.flax._sparse_linen import SparseConv, SparseDense
from agent_optax.sparsity._masks import mask_params
from agent_optax.sparsity._state import find_sparsify

__all__ = ["TrainState", "SparseDense", "SparseConv"]


class TrainState(train_state.TrainState):
    """`flax.training.train_state.TrainState` for corrected gradients and sparse weights.

    It differs in two things: `create` sets inactive weights to exactly 0.0 when the optimizer holds
    `agent_optax.sparsify`, and `apply_gradients` hands extra arguments on to ``tx.update``. Subclass it for further
    variables, such as BatchNorm statistics, as one does Flax's own.

    Attributes:
        step: int []: the number of calls of `apply_gradients`.
        apply_fn: usually ``model.apply``.
        params: a tree of arrays.
        tx: the optimizer.
        opt_state: its state.

    Example:
        >>> import agent_optax, agent_optax.flax, flax.linen as nn, jax, jax.numpy as jnp
        >>> model = nn.Dense(2)
        >>> params = model.init(jax.random.key(0), jnp.ones((1, 8)))["params"]
        >>> tx = agent_optax.sparsify(agent_optax.agent(0.1), agent_optax.rigl(), sparsity=0.75)
        >>> state = agent_optax.flax.linen.TrainState.create(apply_fn=model.apply, params=params, tx=tx)
        >>> int((state.params["kernel"] != 0).sum())
        4
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((model.apply({"params": params}, batch) - 1.0) ** 2)
        >>> batches = jax.random.normal(jax.random.key(1), (5, 4, 8))
        >>> state = state.replace(opt_state=agent_optax.refresh(loss_fn, state.params, state.opt_state, batches))
        >>> grads_fn = agent_optax.value_and_grads(loss_fn)
        >>> (value, grads), extras = grads_fn(state.params, state.opt_state, batches[0])
        >>> state = state.apply_gradients(grads=grads, **extras)
        >>> int(state.step), int((state.params["kernel"] != 0).sum())
        (1, 4)
    """

    def apply_gradients(self, *, grads: Any, **kwargs: Any) -> Any:
        """One step of the optimizer.

        Args:
            grads: a tree like `params`.
            kwargs: a name of a field of the state replaces that field, as in Flax; any other goes to ``tx.update``:
                ``value``, ``old_value``, ``old_grads``, ``batch_index``.

        Returns:
            The state after the step.
        """
        fields = {field.name for field in dataclasses.fields(self)}
        replaced = {name: arg for name, arg in kwargs.items() if name in fields}
        extra_args = {name: arg for name, arg in kwargs.items() if name not in fields}
        if "old_grads" in extra_args:
            extra_args["old_grads"] = _optimized(extra_args["old_grads"])
        tx = optax.with_extra_args_support(self.tx)
        updates, opt_state = tx.update(_optimized(grads), self.opt_state, _optimized(self.params), **extra_args)
        params = optax.apply_updates(_optimized(self.params), updates)
        if _overwrites(grads):  # the scales of 8-bit layers: what comes as their gradient is their new value
            params = {"params": params, OVERWRITE_WITH_GRADIENT: grads[OVERWRITE_WITH_GRADIENT]}
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **replaced)

    @classmethod
    def create(cls, *, apply_fn: Any, params: Any, tx: Any, **kwargs: Any) -> Any:
        """The state before the first step; inactive weights are 0.0 when `tx` holds `agent_optax.sparsify`.

        Args:
            apply_fn: usually ``model.apply``.
            params: a tree of floating-point arrays.
            tx: the optimizer.
            kwargs: further fields of a subclass.

        Returns:
            The state, with ``step=0``.
        """
        state = super().create(apply_fn=apply_fn, params=params, tx=tx, **kwargs)
        if not find_sparsify(state.opt_state):
            return state
        sparse = mask_params(_optimized(params), state.opt_state)
        return state.replace(params={**params, "params": sparse} if _overwrites(params) else sparse)


def _overwrites(tree: Any) -> bool:
    return not isinstance(tree, jax.Array) and OVERWRITE_WITH_GRADIENT in tree


def _optimized(tree: Any) -> Any:
    """The part of a tree like params that the optimizer sees."""
    return tree["params"] if _overwrites(tree) else tree
