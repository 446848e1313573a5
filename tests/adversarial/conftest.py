"""Small models for attacks: those of the golden numbers and a random one."""

import jax
import jax.numpy as jnp
import pytest

EPSILON, STEP_SIZE = 8 / 255, 2 / 255


def linear(params, x):
    weight, bias = params
    return x @ weight + bias


def mlp(params, x):
    first, first_bias, second, second_bias = params
    return jax.nn.relu(x @ first + first_bias) @ second + second_bias


@pytest.fixture(params=["lin", "mlp"])
def case(request, golden):
    """Maker of `(prefix, logits_fn, params, inputs, labels, numbers)`, in a dtype."""
    numbers = golden("attacks_bsr")
    assert numbers["eps_it"].tolist() == [EPSILON, STEP_SIZE]
    names = {"lin": ("Wl", "bl"), "mlp": ("W1", "b1", "W2", "b2")}[request.param]
    logits_fn = {"lin": linear, "mlp": mlp}[request.param]

    def make(dtype):
        params = tuple(jnp.asarray(numbers[name], dtype) for name in names)
        x, y = jnp.asarray(numbers["x"], dtype), jnp.asarray(numbers["y"])
        return request.param, logits_fn, params, x, y, numbers

    return make


@pytest.fixture(scope="session")
def problem():
    """`(logits_fn, params, inputs [13, 5, 3], labels)` of a small model that a small attack hurts."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(15, 8), (8,), (8, 4), (4,)]
    params = tuple(0.7 * jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))

    def logits_fn(params, x):
        return mlp(params, 3 * (x.reshape(len(x), -1) - 0.5))

    x = jax.random.uniform(jax.random.key(1), (13, 5, 3))
    labels = jnp.argmax(logits_fn(params, x), -1)
    return logits_fn, params, x, labels.at[0].set((labels[0] + 1) % 4)  # the first one is wrong
