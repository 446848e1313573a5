"""Connections: what is built, what is refused, and what passes through the transformations of JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from layers_of_each_kind import KINDS, connect

from agent_optax import layers


@pytest.mark.parametrize("kind", KINDS)
@given(inputs=st.integers(1, 30), outputs=st.integers(1, 30), density=st.floats(0, 1), seed=st.integers(0, 9))
@settings(max_examples=3)
def test_random_connections_have_the_number_that_the_density_gives(kind, inputs, outputs, density, seed):
    connections = connect(kind, inputs, outputs, density, seed)
    mask = np.asarray(connections.mask())
    if kind == "any_mask":
        assert mask.sum() == max(1, round(density * inputs * outputs))
    else:
        np.testing.assert_array_equal(mask.sum(axis=0), max(1, round(density * inputs)))
        group = connections.group
        np.testing.assert_array_equal(mask, mask[:, np.arange(outputs) // group * group])
    assert connections.num_weights == mask.sum() == np.prod(connections.values_shape)
    assert connections.density == mask.sum() / mask.size
    assert connections.forward_flops(5) == 10 * mask.sum()


@pytest.mark.parametrize("kind", KINDS)
def test_random_connections_depend_on_the_key_and_use_every_input_alike(kind):
    masks = [np.asarray(connect(kind, 10, 3200, 0.2, seed).mask()) for seed in range(2)]
    assert (masks[0] != masks[1]).any()
    np.testing.assert_allclose(masks[0].mean(axis=1), 0.2, atol=0.12)  # of 200 groups or more: four deviations of 0.028


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_gives_the_connections_that_it_came_from(kind):
    connections = connect(kind, 12, 21)
    mask = connections.mask()
    again = (
        layers.AnyMask.from_mask(mask) if kind == "any_mask" else layers.FanIn.from_mask(mask, group=connections.group)
    )
    assert jax.tree.structure(again) == jax.tree.structure(connections)
    jax.tree.map(np.testing.assert_array_equal, again, connections)


@pytest.mark.parametrize("kind", KINDS)
def test_coordinates_are_those_of_the_mask(kind):
    connections = connect(kind, 12, 21)
    outputs, inputs = np.nonzero(np.asarray(connections.mask()).T)
    np.testing.assert_array_equal(connections.coordinates(), (inputs, outputs))


@pytest.mark.parametrize(("num_inputs", "group", "expected"), [((2,) * 7, 3, 3), ((1, 2), 8, 1), ((5,), 20, 20)])
def test_the_group_is_that_of_the_mask(num_inputs, group, expected):
    """Groups of equal numbers of inputs, of different ones, which no group can have, and all outputs as one group."""
    mask = np.zeros((9, 20), bool)
    for g, n in enumerate(num_inputs):
        mask[g : g + n, g * group : (g + 1) * group] = True
    connections = layers.connections_of(mask)
    is_fan_in = len(set(num_inputs)) == 1
    assert (type(connections), connections.group) == (layers.FanIn if is_fan_in else layers.AnyMask, expected)
    np.testing.assert_array_equal(connections.mask(), mask)
    assert layers.connections_of(mask, group=2).group == (2 if len(num_inputs) == 1 else 1)
    assert layers.connections_of(mask[:, :1]).group == 16


def test_any_mask_from_compressed_rows():
    mask = np.random.default_rng(0).random((9, 7)) < 0.4
    mask[:, 3] = False
    matrix = scipy.sparse.csr_matrix(mask.T)
    connections = layers.AnyMask.from_indices(matrix.indices, matrix.indptr, inputs=9)
    expected = layers.AnyMask.from_mask(mask)
    assert jax.tree.structure(connections) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, connections, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_to_dense_and_back(kind):
    connections = connect(kind, 12, 21)
    values = jax.random.normal(jax.random.key(1), connections.values_shape)
    kernel = layers.to_dense(values, connections)
    np.testing.assert_array_equal(kernel != 0, connections.mask())
    np.testing.assert_array_equal(layers.from_dense(kernel, connections), values)
    dense = jax.random.normal(jax.random.key(2), kernel.shape)
    masked = jnp.where(connections.mask(), dense, 0)
    np.testing.assert_array_equal(layers.to_dense(layers.from_dense(dense, connections), connections), masked)


def test_weights_of_any_mask_are_sorted_by_output_and_then_by_input():
    mask = np.asarray(connect("any_mask", 9, 7, 0.4).mask())
    numbered = np.where(mask, np.arange(63).reshape(7, 9).T, -1)
    values = layers.from_dense(numbered, layers.AnyMask.from_mask(mask))
    np.testing.assert_array_equal(values, np.sort(values))


@pytest.mark.parametrize("counts", [[40, 0, 0, 1], [1, 1, 1, 38], [0, 0, 0, 40], [10, 10, 10, 10]])
def test_uneven_masks_with_equal_numbers_have_equal_shapes(counts):
    mask = np.arange(40)[:, None] < np.array(counts)
    num_weights = int(mask.sum())
    like = np.arange(160).reshape(4, 40).T < num_weights
    connections = layers.AnyMask.from_mask(mask)
    shapes, expected = (jax.eval_shape(lambda c: c, c) for c in (connections, layers.AnyMask.from_mask(like)))
    assert jax.tree.leaves(shapes) == jax.tree.leaves(expected)
    x, values = jnp.arange(80.0).reshape(2, 40), jnp.arange(1.0, num_weights + 1)
    np.testing.assert_allclose(
        layers.sparse_dot(x, values, connections), x @ layers.to_dense(values, connections), rtol=1e-6
    )


@pytest.mark.parametrize("kind", KINDS)
def test_new_connections_of_equal_shape_compile_nothing_anew(kind):
    step = jax.jit(lambda x, values, connections: jax.grad(loss, (0, 1))(x, values, connections))
    for seed in range(3):
        connections = connect(kind, 12, 21, seed=seed)
        step(jnp.ones((2, 12)), jnp.ones(connections.values_shape), connections)
    assert step._cache_size() == 1


def loss(x, values, connections):
    return jnp.sum(jnp.sin(layers.sparse_dot(x, values, connections)))


@pytest.mark.parametrize("kind", KINDS)
def test_connections_are_arrays_that_save_and_stack(kind):
    both = [connect(kind, 12, 21, seed=seed) for seed in range(2)]
    leaves, treedef = jax.tree.flatten(both[0])
    assert all(leaf.dtype == jnp.int32 for leaf in leaves)
    assert repr(treedef.unflatten(leaves)) == repr(both[0])
    stacked = jax.tree.map(lambda *c: jnp.stack(c), *both)
    x = jax.random.normal(jax.random.key(0), (2, 4, 12))
    values = jax.random.normal(jax.random.key(1), (2, *both[0].values_shape))
    y = jax.vmap(layers.sparse_dot)(x, values, stacked)
    _, scanned = jax.lax.scan(lambda carry, layer: (carry, layers.sparse_dot(*layer)), None, (x, values, stacked))
    for i in range(2):
        expected = x[i] @ layers.to_dense(values[i], both[i])
        np.testing.assert_allclose(y[i], expected, atol=1e-5)
        np.testing.assert_allclose(scanned[i], expected, atol=1e-5)


KEY = jax.random.key(0)
MASK = np.array([[True, False, True], [False, True, True]])


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: layers.FanIn.random(KEY, inputs=0, outputs=2, density=0.5), ValueError, "inputs .* got 0"),
        (lambda: layers.FanIn.random(KEY, inputs=2, outputs=2, density=1.5), ValueError, r"density .* got 1\.5"),
        (lambda: layers.FanIn.random(KEY, inputs=2, outputs=2, density=0.5, group=0), ValueError, "group .* got 0"),
        (lambda: layers.AnyMask.random(KEY, inputs=2, outputs=-1, density=0.5), ValueError, "outputs .* got -1"),
        (lambda: layers.FanIn.from_indices([[0], [5]], inputs=5, outputs=2), ValueError, "between 0 and 4.* got 5"),
        (lambda: layers.FanIn.from_indices([[-1], [0]], inputs=5, outputs=2), ValueError, "between 0 and 4.* got -1"),
        (lambda: layers.FanIn.from_indices([[3, 3]], inputs=5, outputs=1), ValueError, "group 0 has 3 twice"),
        (lambda: layers.FanIn.from_indices([[1]], inputs=5, outputs=3), ValueError, r"shape \[3, k\].* got \[1, 1\]"),
        (lambda: layers.FanIn.from_indices([[0.5]], inputs=5, outputs=1), ValueError, "whole numbers, got float64"),
        (lambda: layers.AnyMask.from_indices([0, 5], [0, 2], inputs=5), ValueError, "between 0 and 4.* got 5"),
        (lambda: layers.AnyMask.from_indices([1, 1], [0, 2], inputs=5), ValueError, "output 0 has 1 and then 1"),
        (lambda: layers.AnyMask.from_indices([0, 1], [0, 1], inputs=5), ValueError, "from 0 to 2, .* from 0 to 1"),
        (lambda: layers.AnyMask.from_indices([0, 1], [0, 2, 1, 2], inputs=5), ValueError, "falls after entry 1"),
        (lambda: layers.AnyMask.from_indices([0], [0], inputs=5), ValueError, r"indptr .* got int64 \[1\]"),
        (lambda: layers.AnyMask.from_indices([0.5], [0, 1], inputs=5), ValueError, r"got float64 \[1\]"),
        (lambda: layers.FanIn.from_mask(MASK), ValueError, "between 1 and 2. Use AnyMask"),
        (lambda: layers.FanIn.from_mask(MASK[:, :2], group=2), ValueError, "group=2, output 1 differs from output 0"),
        (lambda: layers.AnyMask.from_mask(MASK & False), ValueError, r"shape \[2, 3\] that is nowhere"),
        (lambda: layers.AnyMask.from_mask(MASK.astype(float)), ValueError, r"bool .* got float64 \[2, 3\]"),
        (lambda: layers.AnyMask.from_mask(MASK[None]), ValueError, r"got bool \[1, 2, 3\]. Reshape"),
        (lambda: jax.jit(layers.AnyMask.from_mask)(MASK), TypeError, "outside jax.jit"),
        (lambda: layers.to_dense(jnp.ones(4), MASK), TypeError, "connections must .* got ndarray"),
        (lambda: layers.from_dense(MASK, "all"), TypeError, "connections must .* got str"),
        (lambda: layers.from_dense(MASK.T, layers.AnyMask.from_mask(MASK)), ValueError, r"\[2, 3\] .* got \[3, 2\]"),
    ],
)
def test_errors_quote_the_value(build, error, message):
    with pytest.raises(error, match=message):
        build()
