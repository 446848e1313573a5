"""How an attack moves: steps along the sign of the gradient, each projected onto the ball."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from agent_optax._tree import wide_dtype
from agent_optax._validation import check_number, check_positive_int, is_concrete_number
from agent_optax.adversarial._attack import StopFn
from agent_optax.adversarial._linf_ball import LinfBall


def check_steps(step_size: Any, num_steps: Any) -> None:
    """Raises ValueError unless `step_size > 0` and `num_steps >= 1`."""
    hint = "pass the length of one step in input units, for example step_size=2/255"
    check_number("step_size", step_size, hint)
    if is_concrete_number(step_size) and step_size <= 0:
        raise ValueError(f"step_size must be positive, got {step_size!r}: {hint}.")
    check_positive_int("num_steps", num_steps, "pass the number of gradient steps, as num_steps=10")


def sign_ascent(
    objective: Callable[[jax.Array], jax.Array],
    start: jax.Array,
    ball: LinfBall,
    *,
    step_size: Any,
    num_steps: int,
    stop_when: StopFn | None = None,
) -> jax.Array:
    """`num_steps` times `x <- project(x + step_size * sign(grad objective(x)))`, from `start`.

    The objective is one number per sample [B], and a sample's number depends on that sample alone,
    so one gradient of the sum serves all. The iterate is kept in float32 (or float64) and the model
    sees it rounded to the inputs' dtype, so that small steps add up in bfloat16, too. An entry
    whose gradient is NaN stays where it is.
    """
    dtype = ball.lower.dtype
    working = wide_dtype(dtype)
    lower, upper = (corner.astype(working) for corner in ball)
    step_size = jnp.asarray(step_size, working)
    start = jnp.asarray(start, working)
    if stop_when is not None:  # a sample may stop at the start, which then has to be in the ball
        start = jnp.clip(start, lower, upper)
    sample = (-1,) + (1,) * (start.ndim - 1)

    def unfinished(state):
        step, _, stopped = state
        return (step < num_steps) & ~jnp.all(stopped)

    def advance(state):
        step, x, stopped = state
        seen = x.astype(dtype)
        if stop_when is not None:
            # Asked before the step and not after it: under jit the model's forward pass at `seen`
            # is then the one that the gradient needs anyway.
            stopped = stopped | stop_when(seen)
        gradient = jax.lax.stop_gradient(jax.grad(lambda z: jnp.sum(objective(z)))(seen))
        sign = jnp.where(jnp.isnan(gradient), 0, jnp.sign(gradient)).astype(working)
        moved = jnp.clip(x + step_size * sign, lower, upper)
        return step + 1, jnp.where(stopped.reshape(sample), x, moved), stopped

    nobody = jnp.zeros(start.shape[0], bool)
    state = (jnp.zeros((), jnp.int32), start, nobody)
    _, x, _ = jax.lax.while_loop(unfinished, advance, state)
    return jax.lax.stop_gradient(x).astype(dtype)
