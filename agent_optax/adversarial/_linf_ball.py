"""Where an attack may go: the points within epsilon of the input and within the data's bounds."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from agent_optax._tree import wide_dtype
from agent_optax._validation import check_number, is_concrete_number


class LinfBall(NamedTuple):
    """A box of the inputs' shape and dtype; `jnp.clip(x, *ball)` is the projection onto it."""

    lower: jax.Array  # [B, ...]
    upper: jax.Array  # [B, ...]


def check_ball(epsilon: Any, bounds: tuple[float, float]) -> None:
    """Raises ValueError unless `epsilon >= 0` and `bounds` are two numbers in order."""
    hint = "pass the radius of the attack in input units, for example epsilon=8/255"
    check_number("epsilon", epsilon, hint)
    if is_concrete_number(epsilon) and epsilon < 0:
        raise ValueError(f"epsilon must not be negative, got {epsilon!r}: {hint}.")
    pair = isinstance(bounds, (tuple, list)) and len(bounds) == 2
    if not pair or not all(is_concrete_number(b) for b in bounds) or not bounds[0] < bounds[1]:
        raise ValueError(
            f"bounds must be two numbers, (lowest, highest), got {bounds!r}: pass the range of the "
            "inputs, (0.0, 1.0) for pixels, or (-math.inf, math.inf) for none."
        )


def linf_ball(inputs: jax.Array, epsilon: Any, bounds: tuple[float, float]) -> LinfBall:
    """The box `{x : |x - inputs| <= epsilon, bounds[0] <= x <= bounds[1]}`, rounded inward.

    Its corners are numbers of the inputs' dtype that satisfy these inequalities as real numbers, so
    that whatever is clipped to them does, and goes on doing so after rounding to that dtype
    (rounding is monotone and leaves the corners alone). Three roundings are made to err inward:

    1. `epsilon` itself, to the largest number of the working dtype (float32, or float64 for
       float64 inputs) that is not above it;
    2. the sum `inputs + epsilon`, with Knuth's two-sum: the sign of its exact error says whether
       the rounded sum is too large;
    3. the narrowing to bfloat16 or float16, by arithmetic that yields numbers of that dtype. (A
       cast that is compared with what went in would be simpler, and wrong: XLA may drop a
       narrowing cast followed by a widening one.)

    An input outside `bounds` counts as far as it can: the bounds hold, the distance then may not.
    """
    radius = _not_above(epsilon, wide_dtype(inputs.dtype))
    lowest, highest = -_not_above(-bounds[0], inputs.dtype), _not_above(bounds[1], inputs.dtype)
    return _corners(inputs, radius, lowest, highest)


@jax.jit  # for attacks outside jit: one small program instead of forty
def _corners(inputs: jax.Array, radius: Any, lowest: Any, highest: Any) -> LinfBall:
    dtype = inputs.dtype
    x = inputs.astype(radius.dtype)
    lower = -_round_down(_add_round_down(-x, radius), dtype).astype(dtype)
    upper = _round_down(_add_round_down(x, radius), dtype).astype(dtype)
    return LinfBall(
        jnp.clip(jnp.minimum(lower, inputs), lowest, highest),
        jnp.clip(jnp.maximum(upper, inputs), lowest, highest),
    )


def _not_above(number: Any, dtype: Any) -> Any:
    """The largest value of `dtype` that is not above `number` (a traced number: the nearest)."""
    if not is_concrete_number(number):
        return jnp.asarray(number, dtype)
    info = jnp.finfo(dtype)
    rounded = np.asarray(np.clip(number, float(info.min), float(info.max)), dtype)
    if rounded.astype(np.float64) > number:
        rounded = np.nextafter(rounded, np.asarray(-np.inf, dtype))
    return rounded


def _add_round_down(x: jax.Array, radius: jax.Array) -> jax.Array:
    """`x + radius`, rounded down."""
    total = x + radius
    share = total - x
    error = (x - (total - share)) + (radius - share)  # x + radius = total + error, exactly
    return jnp.where(error < 0, jnp.nextafter(total, -jnp.inf), total)


def _round_down(x: jax.Array, dtype: Any) -> jax.Array:
    """`x` rounded down to a value of the narrower `dtype`, in the dtype of `x`."""
    if x.dtype == dtype:
        return x
    info = jnp.finfo(dtype)
    x = jnp.clip(x, float(info.min), float(info.max))
    _, exponent = jnp.frexp(x)
    # Values of dtype near x are multiples of one ulp, which stays the same below the normal range.
    # That of bfloat16 ends where float32's does, hence the -100: the ulp itself has to be normal.
    exponent = jnp.maximum(exponent - 1, max(int(info.minexp), -100))
    ulp = jnp.ldexp(jnp.ones_like(x), exponent - info.nmant)
    return jnp.floor(x / ulp) * ulp
