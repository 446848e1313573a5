"""What a memory is: the source of the old gradient in the corrected gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from agent_optax._estimate import Estimate
from agent_optax._tree import conform, keep_finite


class Recalled(NamedTuple):
    """What a memory knows about the batch of the current step.

    Where it knows nothing about an entry, the old gradient of the entry equals its mean, so there is no correction.
    """

    old_grads: optax.Updates  # like the gradient: the old gradient of the same batch
    mean_grads: optax.Updates  # like the gradient: the mean that old_grads scatters around
    is_known: jax.Array  # bool []: False until the memory has something to recall
    old_loss: jax.Array | None = None  # float []: the loss that belongs to old_grads; None if update() must be given it
    is_old_loss_known: jax.Array | bool = True  # bool []: whether a loss was passed when old_grads was stored
    updated_by_refresh: bool = False  # whether refresh() updates the coefficient, instead of each step
    written: Any = None  # what the memory has already written, for its own `Memory.remember`


class MemoryState:
    """Base class of the state of a memory, which is a NamedTuple too.

    ``class MyState(MyFields, MemoryState)``, where ``MyFields`` is the NamedTuple. Only `recall` has no default.
    """

    __slots__ = ()

    def recall(self, grads: optax.Updates, extra_args: Mapping[str, Any]) -> Recalled:
        """The old gradient and its mean for the current step."""
        raise NotImplementedError

    def evaluation_point(self) -> optax.Params | None:
        """The parameters at which `value_and_grads` evaluates a second gradient; None for no second gradient."""
        return None

    def refresh_point(self) -> optax.Params | None:
        """The parameters that `refresh` moves; None for a memory that has no refresh pass.

        A memory that has one has a method ``refreshed(params, mean_grads, batch_grads, losses)`` too, which returns its
        state after a pass at `params`: `batch_grads` [N, ...] if it caches batches, losses [N]. And a field
        ``is_refreshed``, bool []: whether there was such a pass.
        """
        return None

    def num_cached_batches(self) -> int | None:
        """The number of batches a refresh pass must have, whose gradients are kept; None for any number."""
        return None

    def dense_fields(self) -> tuple[str, ...]:
        """Fields that dense storage never resets: when a weight grows, its entries there keep their values."""
        return ()

    def point_fields(self) -> tuple[str, ...]:
        """Fields that hold a stored point: in compact storage they keep the active positions they were stored with."""
        return ()

    def moves_every_step(self) -> bool:
        """Whether the stored point moves with each step, instead of with `refresh`.

        If not, the state of a memory with an `evaluation_point` counts its moves in a field ``num_refreshes``, int32
        [], so that `agent_optax.layers.rewire` can tell whether the point was stored before or after it.
        """
        return False

    def restarted(self, params: optax.Params) -> Any:
        """The memory where the layout of its stored point is lost, if that moves with each step: without a point."""
        del params
        return self


class Memory(Protocol):
    """Where the old gradient comes from: `snapshot()`, `recursion()`, `table()`, `history()`, ..."""

    def init(self, params: optax.Params) -> Any:
        """Returns the empty memory for these parameters, a `MemoryState`."""
        ...

    def remember(
        self,
        memory_state: Any,
        recalled: Recalled,
        grads: optax.Updates,
        corrected: optax.Updates,
        params: optax.Params | None,
        extra_args: Mapping[str, Any],
    ) -> Any:
        """Returns the memory after a step that recalled this, with gradient `grads` and estimate `corrected`."""
        ...

    def default_coefficient(self) -> Any:
        """Returns the coefficient that fits what this memory knows at each step."""
        ...


def passed_loss(extra_args: Mapping[str, Any], last: jax.Array) -> Estimate:
    """The extra argument `value`, in the dtype of `last`; unknown, and then `last`, if it is missing or not finite."""
    if extra_args.get("value") is None:
        return Estimate(last, jnp.zeros_like(last, dtype=bool))
    loss = jnp.zeros_like(last) + jnp.asarray(extra_args["value"]).astype(last.dtype)
    return Estimate(keep_finite(loss, last), jnp.isfinite(loss))


def required(extra_args: Mapping[str, Any], name: str, memory: str) -> Any:
    """Returns the extra argument `name` of `update`, or raises an error that says how to supply it."""
    if extra_args.get(name) is None:
        raise ValueError(
            f"correct_gradients(memory={memory}) needs the extra argument {name}= of update, which is missing. "
            "Compute it with (value, grads), extras = agent_optax.value_and_grads(loss_fn)(params, opt_state, batch) "
            "and call tx.update(grads, opt_state, params, **extras)."
        )
    return extra_args[name]


def required_old_grads(extra_args: Mapping[str, Any], memory: str, grads: optax.Updates) -> optax.Updates:
    """Returns the extra argument `old_grads`, with leaves hidden where they are hidden in `grads`."""
    old_grads = required(extra_args, "old_grads", memory)
    try:
        old_grads = conform(old_grads, grads)
        shapes, old_shapes = (jax.tree.map(jnp.shape, tree) for tree in (grads, old_grads))
    except (TypeError, ValueError):  # the trees have different nodes
        shapes, old_shapes = jax.tree.structure(grads), jax.tree.structure(old_grads)
    if shapes != old_shapes:
        raise ValueError(
            f"old_grads= must be a tree like the gradient, {shapes}, got {old_shapes}. Compute it with "
            "(value, grads), extras = agent_optax.value_and_grads(loss_fn)(params, opt_state, batch)."
        )
    return old_grads


def required_params(params: optax.Params | None, memory: str) -> optax.Params:
    """Returns `params`, or raises an error that says how to supply them."""
    if params is None:
        raise ValueError(
            f"correct_gradients(memory={memory}) remembers the parameters of each step, but update got none: call "
            "tx.update(grads, opt_state, params, **extras)."
        )
    return params
