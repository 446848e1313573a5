"""`sparse_dot` is the product with the dense kernel, in every derivative and under every transformation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers_of_each_kind import KINDS, OTHER_SIZES, connect

from agent_optax import layers
from agent_optax.layers import _fan_in, _rows


def dense_dot(x, values, connections):
    return x @ layers.to_dense(values, connections)


def operands(connections, batch=(4,), dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (*batch, connections.inputs), dtype)
    dy = jax.random.normal(keys[2], (*batch, connections.outputs), dtype)
    return x, jax.random.normal(keys[1], connections.values_shape, dtype), dy


@functools.partial(jax.jit, static_argnums=0)
def both_passes(dot, x, values, dy, connections):
    y, gradients = jax.vjp(lambda x, v: dot(x, v, connections), x, values)
    return y, gradients(dy)


def assert_close(actual, expected, atol=1e-4):
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=atol), actual, expected)


@pytest.mark.parametrize("kind", (*KINDS, *OTHER_SIZES))
@given(
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 40),
    batch=st.sampled_from([(), (0,), (1,), (7,), (2, 3), (3, 1, 2)]),
    density=st.sampled_from([0.01, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=4)
def test_value_and_gradients_are_those_of_the_dense_kernel(kind, inputs, outputs, batch, density, seed):
    connections = connect(kind, inputs, outputs, density, seed)
    x, values, dy = operands(connections, batch, seed=seed)
    y, gradients = both_passes(layers.sparse_dot, x, values, dy, connections)
    assert y.shape == (*batch, outputs)
    assert_close((y, gradients), both_passes(dense_dot, x, values, dy, connections))


@pytest.mark.parametrize("kind", KINDS)
def test_against_numpy(kind):
    connections = connect(kind, 50, 33)
    x, values, _ = operands(connections, (200,))
    kernel = np.zeros((50, 33))
    kernel[np.asarray(connections.mask())] = np.asarray(layers.to_dense(values, connections))[connections.mask()]
    np.testing.assert_allclose(layers.sparse_dot(x, values, connections), np.asarray(x) @ kernel, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_columns_make_no_difference(kind, monkeypatch):
    connections = connect(kind, 50, 33)
    x, values, dy = operands(connections, (150,))

    def passes(x, values, dy, connections):
        return both_passes.__wrapped__(layers.sparse_dot, x, values, dy, connections)

    whole = jax.jit(passes)(x, values, dy, connections)
    monkeypatch.setattr(type(connections), "num_columns", 64)
    in_blocks = jax.jit(lambda *args: passes(*args))
    assert "f32[3,50,50]" in str(jax.make_jaxpr(in_blocks)(x, values, dy, connections))  # three of fifty samples
    assert_close(in_blocks(x, values, dy, connections), whole)


def test_large_batches_are_worked_on_in_blocks():
    few, many = connect("fan_in:1", 50, 33), connect("fan_in:16", 2**14, 2**12, density=0.01)
    assert few.num_columns == _rows.MOST_COLUMNS
    assert many.num_columns * many.indices.size <= _fan_in.LARGEST_GATHER


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bit_numbers_are_added_up_in_float32(kind, dtype):
    connections = connect(kind, 600, 16, density=0.9)
    x, values, dy = operands(connections, (300,), dtype)
    y, (dx, dw) = both_passes(layers.sparse_dot, x, values, dy, connections)
    assert y.dtype == dx.dtype == dw.dtype == dtype
    x, values, dy = (a.astype(jnp.float32) for a in (x, values, dy))
    exact_y, exact_gradients = both_passes(layers.sparse_dot, x, values, dy, connections)
    eps = float(jnp.finfo(dtype).eps)
    for actual, exact in zip((y, dx, dw), (exact_y, *exact_gradients), strict=True):
        # One rounding, at the end: half a unit in the last place of the number itself.
        np.testing.assert_allclose(actual.astype(jnp.float32), exact, rtol=0.51 * eps, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_double_precision(kind, x64):
    connections = connect(kind, 50, 33)
    x, values, dy = operands(connections, (20,), jnp.float64)
    y, gradients = both_passes(layers.sparse_dot, x, values, dy, connections)
    assert y.dtype == jnp.float64
    assert_close((y, gradients), both_passes(dense_dot, x, values, dy, connections), atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_dtypes_promote_as_in_a_product(kind):
    connections = connect(kind, 10, 16)
    x, values, _ = operands(connections)
    assert layers.sparse_dot(x.astype(jnp.bfloat16), values, connections).dtype == jnp.float32
    assert layers.sparse_dot(jnp.ones((2, 10), jnp.int32), values, connections).dtype == jnp.float32
    assert layers.sparse_dot(x.astype(jnp.bfloat16), values.astype(jnp.bfloat16), connections).dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_second_and_third_derivatives(kind):
    connections = connect(kind, 9, 17)
    x, values, _ = operands(connections)
    directions = operands(connections, seed=1)[:2]

    def derivatives(dot):
        def f(operands):
            return jnp.sum(jnp.sin(dot(*operands, connections)))

        def along(f):  # reverse over reverse
            return lambda operands: optax.tree.vdot(jax.grad(f)(operands), directions)

        return jax.jit(lambda point: [jax.grad(g)(point) for g in (f, along(f), along(along(f)))])((x, values))

    assert_close(derivatives(layers.sparse_dot), derivatives(dense_dot), atol=1e-3)


def test_forward_mode_is_refused():
    connections = connect("fan_in:16", 9, 17)
    x, values, _ = operands(connections)
    with pytest.raises(TypeError, match=r"forward-mode .*custom_vjp"):
        jax.jvp(lambda x: layers.sparse_dot(x, values, connections), (x,), (x,))


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_over_x_over_weights_and_over_both(kind):
    connections = connect(kind, 9, 17)
    x, values, _ = operands(connections, (3, 4))
    several = jax.random.normal(jax.random.key(5), (3, *values.shape))

    def gradients(dot, axes):
        def loss(x, v):
            return jnp.sum(jnp.sin(dot(x, v, connections)))

        v = values if axes[1] is None else several
        return jax.jit(jax.vmap(jax.value_and_grad(loss, (0, 1)), axes))(x if axes[0] == 0 else x[0], v)

    for axes in ((0, None), (None, 0), (0, 0)):
        assert_close(gradients(layers.sparse_dot, axes), gradients(dense_dot, axes))


@pytest.mark.parametrize("kind", KINDS)
def test_jit_checkpoint_and_scan(kind):
    connections = connect(kind, 16, 16)
    x, values, _ = operands(connections)

    def deep(dot):
        def layer(x, _):
            return jax.checkpoint(lambda x, v: jnp.tanh(dot(x, v, connections)))(x, values), None

        return jax.jit(jax.grad(lambda x: jnp.sum(jax.lax.scan(layer, x, length=3)[0])))(x)

    assert_close(deep(layers.sparse_dot), deep(dense_dot))
    values = jax.random.normal(jax.random.key(1), values.shape)
    layer_grad = jax.grad(lambda v: jnp.sum(jax.checkpoint(layers.sparse_dot)(x, v, connections) ** 2))
    assert_close(layer_grad(values), jax.grad(lambda v: jnp.sum(dense_dot(x, v, connections) ** 2))(values), 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_stays_where_it_belongs(kind):
    """An output is not finite if and only if one of its own inputs is not: no piece of nothing is multiplied by it."""
    connections = connect(kind, 12, 21, density=0.2)
    values = jnp.ones(connections.values_shape)
    for bad in (0, 5, 11):
        y = layers.sparse_dot(jnp.zeros((3, 12)).at[1, bad].set(jnp.inf), values, connections)
        np.testing.assert_array_equal(jnp.isfinite(y[1]), ~connections.mask()[bad])
        assert jnp.isfinite(y[jnp.array([0, 2])]).all()


def test_errors_quote_the_value():
    connections, others = connect("fan_in:16", 9, 17), connect("fan_in:16", 30, 17)
    x, values, _ = operands(connections)
    with pytest.raises(ValueError, match=r"9 inputs on its last axis.* got the shape \[4, 8\]"):
        layers.sparse_dot(x[:, :8], values, connections)
    with pytest.raises(ValueError, match=r"got the shape \[\]"):
        layers.sparse_dot(1.0, values, connections)
    with pytest.raises(ValueError, match=r"\[17, 9\].*30 inputs, 17 outputs.* got \[17, 3\].*another layer"):
        layers.sparse_dot(jnp.ones((4, 30)), values, others)
    with pytest.raises(TypeError, match=r"connections must be .* got dict"):
        layers.sparse_dot(x, values, {})
    with pytest.raises(TypeError, match="real floating-point arrays, got complex64"):
        layers.sparse_dot(x.astype(jnp.complex64), values, connections)
    with pytest.raises(TypeError, match="got int32 and int32"):
        layers.sparse_dot(jnp.ones((2, 9), jnp.int32), values.astype(jnp.int32), connections)
