"""What a memory is: the source of the old gradient in the corrected gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import optax


class Recalled(NamedTuple):
    """What a memory has to say about the batch of the current step."""

    old_grads: optax.Updates  # like the gradient: the old gradient of the same batch
    mean_grads: optax.Updates  # like the gradient: the mean that old_grads scatters around
    is_known: jax.Array  # bool []: False until the memory has something to recall
    old_loss: jax.Array | None  # float []: the loss that belongs to old_grads, if there is one


class MemoryState(Protocol):
    """The state of a memory; a NamedTuple with these methods."""

    def recall(self, grads: optax.Updates, extra_args: Mapping[str, Any]) -> Recalled:
        """Returns the old gradient and its mean for the current step."""
        ...


class Memory(Protocol):
    """Where the old gradient comes from: `snapshot()`, `history()`, ..."""

    def init(self, params: optax.Params) -> Any:
        """Returns the empty memory for these parameters."""
        ...

    def remember(
        self,
        memory_state: Any,
        grads: optax.Updates,
        corrected: optax.Updates,
        params: optax.Params | None,
        extra_args: Mapping[str, Any],
    ) -> Any:
        """Returns the memory after a step with gradient `grads` and estimate `corrected`."""
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
