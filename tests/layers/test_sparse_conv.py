"""`sparse_conv` is the convolution of JAX with the dense kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers_of_each_kind import KINDS, connect

from agent_optax import layers


def dense_conv(x, values, connections, *, kernel_size, strides, padding):
    kernel = layers.to_dense(values, connections).reshape(*kernel_size, x.shape[-1], connections.outputs)
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=numbers)


def operands(connections, shape, seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    return jax.random.normal(keys[0], shape), jax.random.normal(keys[1], connections.values_shape)


def numpy_passes(x, kernel, strides, padding, dy):
    """Output and both gradients of a convolution with a dense kernel, a window position at a time."""
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    padded = np.pad(x, ((0, 0), *padding, (0, 0)))
    (h, w), (sh, sw) = dy.shape[1:3], strides
    y, dx, dw = np.zeros(dy.shape), np.zeros(padded.shape), np.zeros(kernel.shape)
    for i, j in np.ndindex(*kernel.shape[:2]):
        window = np.s_[:, i : i + (h - 1) * sh + 1 : sh, j : j + (w - 1) * sw + 1 : sw]
        y += padded[window] @ kernel[i, j]
        dx[window] += dy @ kernel[i, j].T
        dw[i, j] = np.einsum("bhwc,bhwo->co", padded[window], dy)
    (top, _), (left, _) = padding
    return y, dx[:, top : top + x.shape[1], left : left + x.shape[2]], dw


@pytest.mark.parametrize("kind", KINDS)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(3, 7), st.integers(3, 7), st.integers(1, 4)),
    kernel_size=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.sampled_from(["SAME", "VALID", ((2, 0), (0, 1))]),
    outputs=st.integers(1, 20),
)
@settings(max_examples=4)
def test_value_and_gradients_are_those_of_the_dense_kernel(kind, shape, kernel_size, strides, padding, outputs):
    connections = connect(kind, kernel_size[0] * kernel_size[1] * shape[-1], outputs)
    x, values = operands(connections, shape)

    def passes(x, v):
        options = {"kernel_size": kernel_size, "strides": strides, "padding": padding}
        y, gradients = jax.vjp(lambda x, v: layers.sparse_conv(x, v, connections, **options), x, v)
        dy = jnp.sin(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
        return y, *gradients(dy), dy

    y, dx, dv, dy = jax.jit(passes)(x, values)
    kernel = np.asarray(layers.to_dense(values, connections)).reshape(*kernel_size, shape[-1], outputs)
    exact_y, exact_dx, exact_dw = numpy_passes(np.asarray(x), kernel, strides, padding, np.asarray(dy))
    exact_dv = layers.from_dense(exact_dw.reshape(-1, outputs), connections)
    for actual, exact in ((y, exact_y), (dx, exact_dx), (dv, exact_dv)):
        np.testing.assert_allclose(actual, exact, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_samples_make_no_difference(kind, monkeypatch):
    connections = connect(kind, 27, 17)
    x, values = operands(connections, (5, 4, 4, 3))

    def gradients():
        def loss(x, v):
            return jnp.sum(jnp.sin(layers.sparse_conv(x, v, connections, kernel_size=3)))

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(x, values)

    whole = gradients()
    monkeypatch.setattr(type(connections), "num_columns", 32)  # two samples of 16 positions
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradients(), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_vmap_and_leading_axes(kind):
    connections = connect(kind, 9 * 2, 9)
    x, values = operands(connections, (2, 3, 4, 4, 2))
    options = {"kernel_size": (3, 3), "strides": (1, 1), "padding": "SAME"}

    def hessian_product(conv, x):
        def loss(v):
            return jnp.sum(jnp.sin(conv(x, v, connections, **options)))

        return jax.grad(lambda v: jnp.vdot(jax.grad(loss)(v), jnp.sin(v)))(values)

    sparse, dense = (
        jax.jit(jax.vmap(lambda x, conv=conv: hessian_product(conv, x)))(x) for conv in (layers.sparse_conv, dense_conv)
    )
    np.testing.assert_allclose(sparse, dense, atol=1e-3)
    y = layers.sparse_conv(x, values, connections, **options)
    np.testing.assert_allclose(y[1], dense_conv(x[1], values, connections, **options), atol=1e-4)


@pytest.mark.parametrize("kind", ["fan_in:16", "any_mask"])
def test_bfloat16(kind):
    connections = connect(kind, 18, 9)
    x, values = (a.astype(jnp.bfloat16) for a in operands(connections, (3, 4, 4, 2)))
    y = layers.sparse_conv(x, values, connections, kernel_size=3)
    exact = layers.sparse_conv(x.astype(jnp.float32), values.astype(jnp.float32), connections, kernel_size=3)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 2}, "3 channels, which makes 12 inputs with a kernel of 2 x 2; the connections have 27"),
        ({"kernel_size": 0}, "kernel_size must be .* got 0"),
        ({"kernel_size": (3, 3, 3)}, r"kernel_size must be .* got \(3, 3, 3\)"),
        ({"kernel_size": 3, "strides": 1.5}, r"strides must be .* got 1\.5"),
        ({"kernel_size": 3, "padding": "FULL"}, "padding must be .* got 'FULL'"),
        ({"kernel_size": 3, "padding": ((-1, 0), (0, 0))}, "none of them negative"),
        ({"kernel_size": 3, "padding": ((0, 0),)}, "padding must be"),
        ({"kernel_size": (9, 1), "padding": "VALID"}, "kernel of 9 x 1 does not fit into the 4 x 4"),
    ],
)
def test_errors_quote_the_value(options, message):
    connections = connect("fan_in:16", 27, 8)
    x, values = operands(connections, (1, 4, 4, 3))
    with pytest.raises(ValueError, match=message):
        layers.sparse_conv(x, values, connections, **options)
    with pytest.raises(ValueError, match=r"\[..., height, width, channels in\], got \[4, 3\]"):
        layers.sparse_conv(x[0, 0], values, connections, kernel_size=3)
