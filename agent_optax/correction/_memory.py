"""What a memory is: the source of the old gradient in the corrected gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import optax

from agent_optax._tree import conform


class Recalled(NamedTuple):
    """What a memory has to say about the batch of the current step.

    An entry about which it has nothing to say has its old gradient for its mean, and so no correction.
    """

    old_grads: optax.Updates  # like the gradient: the old gradient of the same batch
    mean_grads: optax.Updates  # like the gradient: the mean that old_grads scatters around
    is_known: jax.Array  # bool []: False until the memory has something to recall
    old_loss: jax.Array | None  # float []: the loss that belongs to old_grads; None when nobody told it
    told_by_refresh: bool = False  # whether refresh, and not each step, feeds the coefficient and counts its time
    written: Any = None  # what the memory has written already, for its own `Memory.remember`


class MemoryState(Protocol):
    """The state of a memory; a NamedTuple with these methods.

    A memory that wants the gradient of the current batch at other parameters has a method ``evaluation_point()``; one
    that `refresh` moves has ``refreshed(...)`` and ``num_cached_batches()``, as `SnapshotState`. When weights grow,
    `sparsify` sets their entries to the value from `Memory.init`, but for the fields that ``dense_fields()`` and
    ``point_fields()`` name; ``moves_every_step()`` tells that those points move with each step.
    """

    def recall(self, grads: optax.Updates, extra_args: Mapping[str, Any]) -> Recalled:
        """Returns the old gradient and its mean for the current step."""
        ...


class Memory(Protocol):
    """Where the old gradient comes from: `snapshot()`, `recursion()`, `table()`, `history()`, ..."""

    def init(self, params: optax.Params) -> Any:
        """Returns the empty memory for these parameters."""
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
        """Returns the coefficient that fits what this memory is told at each step."""
        ...


def required(extra_args: Mapping[str, Any], name: str, memory: str) -> Any:
    """Returns the extra argument `name` of `update`, or says how to supply it."""
    if extra_args.get(name) is None:
        raise ValueError(
            f"correct_gradients(memory={memory}) needs the extra argument {name}= of update, which is missing. "
            "Compute it with (value, grads), extras = agent_optax.value_and_grads(loss_fn)(params, opt_state, batch) "
            "and call tx.update(grads, opt_state, params, **extras)."
        )
    return extra_args[name]


def required_old_grads(extra_args: Mapping[str, Any], memory: str, grads: optax.Updates) -> optax.Updates:
    """Returns the extra argument `old_grads`, with what is hidden in `grads` hidden, or says what is wrong with it."""
    old_grads = required(extra_args, "old_grads", memory)
    try:
        old_grads = conform(old_grads, grads)
        shapes, old_shapes = (jax.tree.map(jax.numpy.shape, tree) for tree in (grads, old_grads))
    except (TypeError, ValueError):  # the trees have different nodes
        shapes, old_shapes = jax.tree.structure(grads), jax.tree.structure(old_grads)
    if shapes != old_shapes:
        raise ValueError(
            f"old_grads= must be a tree like the gradient, {shapes}, got {old_shapes}. Compute it with "
            "(value, grads), extras = agent_optax.value_and_grads(loss_fn)(params, opt_state, batch)."
        )
    return old_grads


def required_params(params: optax.Params | None, memory: str) -> optax.Params:
    """Returns `params`, or says how to supply them."""
    if params is None:
        raise ValueError(
            f"correct_gradients(memory={memory}) remembers the parameters of each step, but update got none: call "
            "tx.update(grads, opt_state, params, **extras)."
        )
    return params
