"""A training loop with a sparse optimizer in one compiled program."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from conformance import jit

import agent_optax


def train(tx: Any, params: Any, gradient: Callable[[Any, jax.Array], Any], num_steps: int) -> tuple[Any, Any, Any]:
    """Parameters and state after some steps from the masked parameters, and the parameters before each step.

    ``gradient(params, step)`` gives the gradient of step 0, 1, ...
    """

    @jit
    def run(params: Any) -> Any:
        opt_state = tx.init(params)

        def body(carry: Any, step: jax.Array) -> Any:
            params, opt_state = carry
            updates, opt_state = tx.update(gradient(params, step), opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), params

        return jax.lax.scan(body, (agent_optax.mask_params(params, opt_state), opt_state), jnp.arange(num_steps))

    (params, opt_state), before = run(params)
    return params, opt_state, before
