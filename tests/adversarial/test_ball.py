"""Iterates are in the ball and the bounds as real numbers, whatever the dtype."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from agent_optax import adversarial
from agent_optax.adversarial._linf_ball import linf_ball

DTYPES = [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64]
BOUNDS = [(0.0, 1.0), (-1.0, 1.0), (-2.3, 2.6), (0.1, 0.7), (-math.inf, math.inf), (0, 255)]

unit = st.floats(0.0, 1.0)


@pytest.fixture(params=DTYPES, ids=lambda dtype: jnp.dtype(dtype).name)
def dtype(request):
    if request.param == jnp.float64:
        request.getfixturevalue("x64")
    return request.param


def exact(array):
    """The entries as fractions (no rounding hides in a comparison of these)."""
    return [Fraction(float(entry)) for entry in np.asarray(array, np.float64).ravel()]


def inside(bounds, share, dtype):
    """Numbers of the dtype within the bounds, zero and the bounds' neighbours among them."""
    lowest, highest = np.clip(bounds, -300.0, 300.0)
    numbers = np.asarray(lowest + np.asarray(share) * (highest - lowest), dtype)
    numbers = numbers[(numbers.astype(np.float64) >= bounds[0])]
    numbers = numbers[(numbers.astype(np.float64) <= bounds[1])]
    tiny = float(jnp.finfo(dtype).smallest_normal)  # below it float32 arithmetic flushes to zero
    return np.where(np.abs(numbers.astype(np.float64)) < tiny, 0, numbers).astype(dtype)


def test_corners_are_the_outermost_numbers_allowed(dtype):
    @settings(max_examples=60)
    @given(st.lists(unit, min_size=6, max_size=6), st.floats(1e-6, 2.0), st.sampled_from(BOUNDS))
    def check(share, epsilon, bounds):
        x = inside(bounds, share, dtype)
        assume(len(x) == 6)  # one shape, one compilation
        lower, upper = (np.asarray(corner) for corner in linf_ball(jnp.asarray(x), epsilon, bounds))
        assert lower.dtype == upper.dtype == x.dtype
        radius = Fraction(epsilon)
        # the radius itself is rounded, down, to the working dtype
        shortened = radius * (1 - Fraction(1, 2 ** (52 if dtype == jnp.float64 else 23)))
        for sign, corner in ((1, upper), (-1, lower)):
            beyond = np.nextafter(corner, np.asarray(sign * np.inf, dtype))
            bound = bounds[1] if sign == 1 else -bounds[0]
            for here, edge, next_one in zip(exact(x), exact(corner), exact(np.nan_to_num(beyond)), strict=True):
                distance = sign * (edge - here)
                assert 0 <= distance <= radius
                assert sign * edge <= bound
                assert sign * (next_one - here) > shortened or sign * next_one > bound

    check()


def test_radius_zero_is_the_point_itself(dtype):
    x = jnp.asarray([0.0, 0.1, 1.0], dtype)
    np.testing.assert_array_equal(linf_ball(x, 0.0, (0.0, 1.0)), [x, x])


def test_bounds_hold_for_inputs_outside_them(dtype):
    x = jnp.asarray([-5.0, -0.01, 1.01, 5.0], dtype)
    for corner in linf_ball(x, 0.1, (0.0, 1.0)):
        assert 0 <= corner.min() and corner.max() <= 1


def test_attacks_end_in_the_ball(dtype):
    shape = (3, 4)

    def loss_fn(weight, x, labels):
        return jnp.sum(jnp.sin(weight.astype(x.dtype) * x), -1) + 0 * labels

    def logits_fn(weight, x):
        return x @ weight.astype(x.dtype).T

    @jax.jit
    def attacks(weight, x, epsilon, step_size, key):
        labels = jnp.zeros(3, int)
        steps = {"epsilon": epsilon, "step_size": step_size, "num_steps": 3}
        return [
            adversarial.fgsm(loss_fn, epsilon=epsilon)(weight, x, labels),
            adversarial.pgd(loss_fn, **steps, restarts=2, targeted=True)(weight, x, labels, key),
            adversarial.trades_attack(logits_fn, **steps)(weight, x, labels, key),
        ]

    @settings(max_examples=25)
    @given(
        st.lists(unit, min_size=12, max_size=12),
        st.floats(0.0, 1.0, width=32),
        st.floats(2**-13, 2.0, width=32),
        st.integers(0, 2**31 - 1),
    )
    def check(share, epsilon, step_size, seed):
        x = inside((0.0, 1.0), share, dtype).reshape(shape)
        weight = jax.random.normal(jax.random.key(seed), shape)
        for attacked in attacks(weight, x, epsilon, step_size, seed):
            assert attacked.dtype == x.dtype
            for here, there in zip(exact(x), exact(attacked), strict=True):
                assert abs(there - here) <= Fraction(epsilon)
                assert 0 <= there <= 1

    check()


def test_corners_survive_jit_of_a_cast():
    """A narrowing cast in the same program must not be skipped in the box's arithmetic."""
    x = jax.random.uniform(jax.random.key(0), (500,))
    for dtype in (jnp.bfloat16, jnp.float16):

        def corners(x, dtype=dtype):
            x = x.astype(dtype)
            return x, *linf_ball(x, 8 / 255, (0.0, 1.0))

        for eager, jitted in zip(corners(x), jax.jit(corners)(x), strict=True):
            np.testing.assert_array_equal(eager, jitted)
