"""The gradient of a step: one for each parameter, of its shape; and what its precision does."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import agent_optax

both_storages = pytest.mark.parametrize("storage", ["dense", "compact"])
PARAMS = {"dense": {"kernel": jnp.ones((6, 5)), "bias": jnp.ones(5)}}


def sparse(inner: Any = None, storage: str = "dense", sparsity: float = 0.5) -> Any:
    inner = optax.sgd(1.0) if inner is None else inner
    return agent_optax.sparsify(inner, agent_optax.rigl(), sparsity=sparsity, storage=storage)


@both_storages
@pytest.mark.parametrize(
    "shape", [(5, 6), (4, 6, 5), (30,), (1, 6, 5), (6, 1)], ids=["transposed", "per example", "flat", "axis", "column"]
)
def test_another_shape_is_an_error_that_names_the_leaf_and_both_shapes(shape: tuple[int, ...], storage: str) -> None:
    tx = sparse(storage=storage)
    grads = {"dense": {"kernel": jnp.ones(shape), "bias": jnp.ones(5)}}
    message = rf"dense/kernel has the shape {re.escape(str(list(shape)))}, but the parameter has \[6, 5\]"
    with pytest.raises(ValueError, match=message):
        tx.update(grads, tx.init(PARAMS), PARAMS)


@both_storages
def test_another_tree_is_an_error_that_names_what_is_missing(storage: str) -> None:
    tx = sparse(storage=storage)
    with pytest.raises(ValueError, match="like params, but it lacks dense/bias"):
        tx.update({"dense": {"kernel": PARAMS["dense"]["kernel"]}}, tx.init(PARAMS), PARAMS)


def test_gradients_of_single_examples_are_combined_before() -> None:
    """Sparse DP-SGD: the remedy that the error names."""
    private = optax.contrib.differentially_private_aggregate(1.0, 0.0, 0)
    tx = optax.chain(private, sparse(optax.sgd(0.1)))
    params = agent_optax.mask_params(PARAMS, opt_state := tx.init(PARAMS))
    per_example = jax.tree.map(lambda p: jnp.stack([p, 3 * p]), params)
    updates, _ = tx.update(per_example, opt_state, params)
    active = np.asarray(params["dense"]["kernel"]) != 0
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(params)))
    np.testing.assert_allclose(updates["dense"]["kernel"], np.where(active, -0.1 / norm, 0), rtol=1e-6)


@both_storages
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_step_rounds_as_optax_does(dtype: str, storage: str) -> None:
    """Float32 gradients of half-precision parameters, nothing pruned: rounded once, when they are added."""
    params = {"kernel": jax.random.normal(jax.random.key(0), (64, 64), dtype)}
    grads = jax.tree.map(lambda p: 0.3 * jax.random.normal(jax.random.key(1), p.shape), params)
    tx = sparse(storage=storage, sparsity=0.0)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    expected = optax.apply_updates(params, jax.tree.map(jnp.negative, grads))
    np.testing.assert_array_equal(optax.apply_updates(params, updates)["kernel"], expected["kernel"])


@both_storages
def test_numbers_of_python_and_numpy_compile_once(storage: str) -> None:
    """Some steps outside jax.jit, each with another value."""
    calls = []

    def counted(updates: Any, state: Any, params: Any = None, *, value: Any, **_: Any) -> Any:
        calls.append(value)
        return jax.tree.map(lambda u: -0.1 * u * value, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), counted)
    tx = sparse(inner, storage)
    opt_state = tx.init(PARAMS)
    params = agent_optax.mask_params(PARAMS, opt_state)
    for make in (float, np.float32, jnp.float32):
        updates, opt_state = tx.update(PARAMS, opt_state, params, value=make(1.0))
        num_calls = len(calls)
        for value in (2.0, 3.0):
            updates, opt_state = tx.update(PARAMS, opt_state, params, value=make(value))
            np.testing.assert_allclose(updates["dense"]["bias"], -0.1 * value, rtol=1e-6)
        assert len(calls) == num_calls
