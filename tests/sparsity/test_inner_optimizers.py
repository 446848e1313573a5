"""Inner optimizers that read more than one entry at a time, or the shape of a parameter, or keep unusual states."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import jit
from jax.ad_checkpoint import checkpoint_name

import agent_optax

SHAPE = (6, 6)
NUM_STEPS, UPDATE_EVERY = 5, 2
FACTORS = (1.0, 1e3)
RATE = 0.1


def stateless(function: Callable[[jax.Array, jax.Array], jax.Array]) -> Any:
    """Updates by `function` of gradient and parameter, leaf by leaf."""
    return optax.stateless(lambda grads, params: jax.tree.map(function, grads, params))


def halved_until_small(grad: jax.Array, param: jax.Array) -> jax.Array:
    del param
    return -RATE * jax.lax.while_loop(lambda g: jnp.sum(g**2) > 1.0, lambda g: 0.5 * g, grad)


def summed_by_scan(grad: jax.Array, param: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda p, _: (p - 0.01 * grad, None), param, length=3)[0] - param


def rounds_of_newton(grad: jax.Array, param: jax.Array) -> jax.Array:
    del param
    return jax.lax.fori_loop(0, 3, lambda _, g: g - 0.1 * jnp.tanh(g), -RATE * grad)


def softmaxed(grad: jax.Array, param: jax.Array) -> jax.Array:
    """A sum to which zeros contribute: exp(0) = 1."""
    del param
    return -RATE * jnp.exp(grad) / jnp.sum(jnp.exp(grad))


def through_pallas(grad: jax.Array, param: jax.Array) -> jax.Array:
    from jax.experimental import pallas

    def kernel(g: Any, out: Any) -> None:
        out[...] = -RATE * g[...]

    del param
    return pallas.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(grad.shape, grad.dtype), interpret=True)(grad)


class Two(NamedTuple):
    first: Any
    second: Any


def one_array_in_two_fields() -> Any:
    """The fields differ in their initial value alone."""

    def update(grads: Any, state: Two, params: Any = None) -> Any:
        del params
        new = jax.tree.map(lambda a, b, g: 0.5 * a + 0.5 * b + g, state.first, state.second, grads)
        return jax.tree.map(lambda n: -RATE * n, new), Two(new, new)

    return optax.GradientTransformation(
        lambda p: Two(jax.tree.map(jnp.zeros_like, p), jax.tree.map(jnp.ones_like, p)), update
    )


def one_sided_shampoo() -> Any:
    """The statistics of a square kernel have its shape, and hold no entries of it."""

    def update(grads: Any, stats: Any, params: Any = None) -> Any:
        del params
        stats = jax.tree.map(lambda s, g: s + g @ g.T, stats, grads)
        return jax.tree.map(lambda s, g: -jnp.linalg.solve(s, g), stats, grads), stats

    return optax.GradientTransformation(
        lambda params: jax.tree.map(lambda p: 0.1 * jnp.eye(p.shape[0]), params), update
    )


def decayed_matrices() -> Any:
    return optax.adamw(RATE, weight_decay=0.5, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params))


def labeled_by_rank() -> Any:
    labels = lambda params: jax.tree.map(lambda p: "matrix" if p.ndim > 1 else "row", params)  # noqa: E731
    return optax.partition({"matrix": optax.sgd(RATE), "row": optax.set_to_zero()}, labels)


def towards_the_start(start: jax.Array) -> Any:
    """L2-SP: decay towards given parameters, which the optimizer holds whole."""
    return stateless(lambda g, p: -RATE * (g + 0.1 * (p - start) if g.ndim > 1 else g))


START = jax.random.normal(jax.random.key(0), SHAPE)

# What compact storage accepts, and what it refuses, with the words that it uses.
ACCEPTED: dict[str, Callable[[], Any]] = {
    "momentum": lambda: optax.sgd(RATE, momentum=0.9),
    "one array in two fields": one_array_in_two_fields,
    "while with a sum": lambda: stateless(halved_until_small),
    "scan": lambda: stateless(summed_by_scan),
    "fori_loop": lambda: stateless(rounds_of_newton),
    "names": lambda: stateless(lambda g, p: checkpoint_name(-RATE * g, "update")),
    "vdot": lambda: stateless(lambda g, p: -RATE * g / (1 + jnp.vdot(g, g))),
    "remat": lambda: stateless(jax.checkpoint(lambda g, p: -RATE * jnp.sin(g))),
    "weight decay by rank": decayed_matrices,
    "labels by rank": labeled_by_rank,
}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "fan-in": (lambda: stateless(lambda g, p: -RATE * g / p.shape[0]), "reads the shape or the size"),
    "size": (lambda: stateless(lambda g, p: -RATE * g / p.size), "reads the shape or the size"),
    "mean": (lambda: stateless(lambda g, p: -RATE * g / (1 + jnp.mean(g**2))), "reads the shape or the size"),
    "start": (lambda: towards_the_start(START), "active entries"),
    "square statistics": (one_sided_shampoo, "dot_general"),
    "exponentials": (lambda: stateless(softmaxed), "reduce_sum to which inactive weights"),
    "pallas": (lambda: stateless(through_pallas), "pallas_call"),
    "rows": (lambda: stateless(lambda g, p: -RATE * g / (1 + jnp.sum(g**2, axis=0))), "reduce_sum"),
    "order": (lambda: stateless(lambda g, p: -RATE * jnp.cumsum(g, axis=0)), "cumsum"),
}
BOTH = {**ACCEPTED, **{name: make for name, (make, _) in REFUSED.items()}}


def sparse(inner: Any, storage: str) -> Any:
    mask = np.random.default_rng(1).random(SHAPE) < 0.5
    topology = agent_optax.rigl(UPDATE_EVERY)
    return agent_optax.sparsify(inner, topology, masks={"kernel": mask, "bias": None}, storage=storage)


@functools.cache
def run(name: str, storage: str) -> Any:
    """The kernels [factors, steps, ...]; gradients of inactive weights are multiplied by each factor of `FACTORS`."""
    tx = sparse(BOTH[name](), storage)

    @jit
    def train(factor: jax.Array) -> jax.Array:
        params = {"kernel": START, "bias": jnp.linspace(-1, 1, 6)}
        opt_state = tx.init(params)
        params = agent_optax.mask_params(params, opt_state)

        def body(carry: Any, key: jax.Array) -> Any:
            params, opt_state = carry
            grads = jax.tree.map(lambda p: jax.random.normal(key, p.shape), params)
            mask = agent_optax.active_masks(opt_state, params)["kernel"]
            grads["kernel"] = jnp.where(mask, grads["kernel"], factor * (10 + grads["kernel"]))
            updates, opt_state = tx.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            inactive = ~agent_optax.active_masks(opt_state, params)["kernel"]
            return (params, opt_state), (params["kernel"], jnp.any(params["kernel"] * inactive != 0))

        return jax.lax.scan(body, (params, opt_state), jax.random.split(jax.random.key(2), NUM_STEPS))[1]

    runs = [train(jnp.asarray(factor)) for factor in FACTORS]
    assert not any(is_wrong.any() for _, is_wrong in runs)
    return np.stack([kernels for kernels, _ in runs])


@pytest.mark.parametrize("name", BOTH)
def test_gradients_of_inactive_weights_reach_no_active_one(name: str) -> None:
    small, large = run(name, "dense")
    np.testing.assert_array_equal(small, large)


@pytest.mark.parametrize("name", ACCEPTED)
def test_compact_storage_gives_the_numbers_of_dense_storage(name: str) -> None:
    np.testing.assert_allclose(run(name, "compact"), run(name, "dense"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", REFUSED)
def test_compact_storage_refuses_what_it_would_change_and_says_why(name: str) -> None:
    make, words = REFUSED[name]
    tx = sparse(make(), "compact")
    with pytest.raises(ValueError, match=f"{words}.*storage=.dense"):
        tx.init({"kernel": START, "bias": jnp.ones(6)})


def test_each_field_keeps_its_own_initial_value() -> None:
    """A grown weight starts from (0, 1), though the optimizer returns one array for both fields."""
    tx = sparse(one_array_in_two_fields(), "dense")
    params = {"kernel": START, "bias": jnp.ones(6)}
    opt_state = tx.init(params)
    params = agent_optax.mask_params(params, opt_state)
    before = np.asarray(params["kernel"]) != 0
    for _ in range(UPDATE_EVERY):
        updates, opt_state = tx.update(jax.tree.map(jnp.cos, params), opt_state, params)
        params = optax.apply_updates(params, updates)
    grown = np.asarray(agent_optax.active_masks(opt_state, params)["kernel"]) & ~before
    assert grown.any()
    np.testing.assert_array_equal(opt_state.inner_state.first["kernel"][grown], 0)
    np.testing.assert_array_equal(opt_state.inner_state.second["kernel"][grown], 1)


@pytest.mark.parametrize("shape", [(6, 5), (6, 6)], ids=["oblong", "square"])
def test_statistics_of_the_kernels_shape_are_left_alone(shape: tuple[int, int]) -> None:
    """Shampoo, static: the plain optimizer on masked gradients gives the same updates."""
    mask = jax.random.bernoulli(jax.random.key(1), 0.5, shape)
    tx, plain = agent_optax.sparsify(one_sided_shampoo(), agent_optax.static(), masks=mask), one_sided_shampoo()
    params = jnp.where(mask, jax.random.normal(jax.random.key(0), shape), 0)
    opt_state, plain_state = tx.init(params), plain.init(params)
    for seed in range(3):
        grads = jax.random.normal(jax.random.key(seed), shape)
        updates, opt_state = tx.update(grads, opt_state, params)
        expected, plain_state = plain.update(jnp.where(mask, grads, 0), plain_state)
        np.testing.assert_allclose(jnp.where(mask, updates, 0), jnp.where(mask, expected, 0), rtol=1e-5)


def test_flattened_states_cannot_be_started_again() -> None:
    inner = optax.flatten(optax.adam(RATE))
    with pytest.raises(ValueError, match=r"optax\.flatten.*without optax\.flatten, or with agent_optax\.static"):
        sparse(inner, "dense").init({"kernel": START, "bias": jnp.ones(6)})
    mask = jax.random.bernoulli(jax.random.key(1), 0.5, SHAPE)
    tx, adam = agent_optax.sparsify(inner, agent_optax.static(), masks=mask), optax.adam(RATE)
    params = jnp.where(mask, START, 0)
    updates, _ = tx.update(jnp.cos(START), tx.init(params), params)
    expected, _ = adam.update(jnp.cos(START), adam.init(params))
    np.testing.assert_allclose(updates, jnp.where(mask, expected, 0), rtol=1e-6)


@pytest.mark.parametrize("make", [optax.lbfgs, lambda: optax.chain(optax.sgd(1.0), optax.scale_by_zoom_linesearch(15))])
def test_line_searches_look_at_sparse_parameters(make: Callable[[], Any]) -> None:
    """The function is evaluated where inactive weights are zero, and the loss falls to its minimum there."""
    mask = np.random.default_rng(1).random(SHAPE) < 0.5
    tx = agent_optax.sparsify(make(), agent_optax.static(), masks=mask)
    value_fn = lambda p: jnp.sum(jnp.cosh(p - 1))  # noqa: E731
    params = jnp.where(mask, START, 0)

    @jit
    def step(params: Any, opt_state: Any) -> Any:
        value, grads = jax.value_and_grad(value_fn)(params)
        updates, opt_state = tx.update(grads, opt_state, params, value=value, grad=grads, value_fn=value_fn)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    for _ in range(40):
        params, opt_state = step(params, opt_state)
    np.testing.assert_allclose(params, mask, atol=1e-3)
