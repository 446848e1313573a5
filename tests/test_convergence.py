"""Optimizers find the minimum: of a parabola, of the Rosenbrock function, of a parabola whose minimum is sparse."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import jit

import agent_optax

# The noise that each batch adds to the gradient has mean zero, so that the minimum is that of the function.
NOISE = jnp.asarray([[1.0, -0.5], [-1.0, 0.5], [0.5, 1.0], [-0.5, -1.0]])
NUM_BATCHES = len(NOISE)


def run(tx: Any, function: Any, params: Any, noise: jax.Array, num_epochs: int, num_steps: int) -> Any:
    """Epochs of `num_steps` steps on batches in random order, each epoch after a refresh if there is a snapshot."""

    def loss(params: Any, batch: Any) -> jax.Array:
        return function(params) + jnp.sum(batch * params)

    def step(carry: Any, index: Any) -> Any:
        params, opt_state = carry
        (_, grads), extras = agent_optax.value_and_grads(loss)(params, opt_state, noise[index])
        updates, opt_state = tx.update(grads, opt_state, params, batch_index=index, **extras)
        return (optax.apply_updates(params, updates), opt_state), None

    def epoch(carry: Any, key: Any) -> Any:
        params, opt_state = carry
        if optax.tree.get(opt_state, "snapshot") is not None:
            opt_state = agent_optax.refresh(loss, params, opt_state, noise)
        return jax.lax.scan(step, (params, opt_state), jax.random.randint(key, (num_steps,), 0, NUM_BATCHES))

    @jit
    def epochs(params: Any) -> Any:
        opt_state = tx.init(params)
        if isinstance(opt_state, agent_optax.SparsifyState):
            params = agent_optax.mask_params(params, opt_state)
        return jax.lax.scan(epoch, (params, opt_state), jax.random.split(jax.random.key(0), num_epochs))[0]

    return epochs(params)


def parabola(params: jax.Array) -> jax.Array:
    return jnp.sum(jnp.asarray([1.0, 0.2]) * (params - jnp.asarray([1.0, -1.0])) ** 2)


def rosenbrock(params: jax.Array) -> jax.Array:
    return (1 - params[0]) ** 2 + 100 * (params[1] - params[0] ** 2) ** 2


PROBLEMS = {  # function, start, minimum, learning rate, noise, epochs, steps in an epoch
    "parabola": (parabola, [-1.0, 10.0], [1.0, -1.0], 0.05, 0.05, 20, 40),
    "rosenbrock": (rosenbrock, [0.0, 0.0], [1.0, 1.0], 1e-3, 0.01, 60, 500),
}


def corrected_sgd(memory: Any, scaling: float = 1.0) -> Callable[[float], Any]:
    correction = agent_optax.correct_gradients(memory, agent_optax.gradient_regression(), scaling)
    return lambda lr: optax.chain(correction, optax.sgd(lr))


OPTIMIZERS: dict[str, Callable[[float], Any]] = {
    "sgd": optax.sgd,
    "agent": lambda lr: agent_optax.agent(lr / 2, momentum=0.5, weight_decay=0.0),
    "svrg": agent_optax.svrg,
    "alpha_svrg": lambda lr: agent_optax.alpha_svrg(lr, num_refreshes=40),
    "storm": agent_optax.storm,
    "mars": lambda lr: optax.chain(agent_optax.mars_correction(max_norm=None), optax.trace(0.9), optax.scale(-lr / 10)),
    "snapshot": corrected_sgd(agent_optax.snapshot()),
    "cached_snapshot": corrected_sgd(agent_optax.snapshot(cached_batches=NUM_BATCHES)),
    "table": corrected_sgd(agent_optax.table(NUM_BATCHES)),
    "recursion": corrected_sgd(agent_optax.recursion(), 0.9),
    "history": corrected_sgd(agent_optax.history()),
}


@functools.cache
def distance_to_the_minimum(name: str, problem: str) -> float:
    function, start, minimum, learning_rate, noise, num_epochs, num_steps = PROBLEMS[problem]
    tx = OPTIMIZERS[name](learning_rate)
    params, _ = run(tx, function, jnp.asarray(start), noise * NOISE, num_epochs, num_steps)
    return float(jnp.max(jnp.abs(params - jnp.asarray(minimum))))


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_finds_the_minimum(name: str, problem: str) -> None:
    assert distance_to_the_minimum(name, problem) < 3e-2


@pytest.mark.parametrize("name", ["svrg", "snapshot", "cached_snapshot", "table"])
def test_variance_reduction_goes_below_the_noise_of_sgd(name: str) -> None:
    assert distance_to_the_minimum(name, "parabola") < 0.05 * distance_to_the_minimum("sgd", "parabola")


# Sixteen of 64 weights may be active and ten are needed: the six others are what a topology update drops.
SHAPE, NUM_NEEDED, SPARSITY = (8, 8), 10, 0.75
NEEDED = np.random.default_rng(0).choice(64, NUM_NEEDED, replace=False)
SPARSE_MINIMUM = np.zeros(64, np.float32)
SPARSE_MINIMUM[NEEDED] = np.random.default_rng(1).choice([-1, 1], NUM_NEEDED) * np.linspace(0.5, 2, NUM_NEEDED)
SPARSE_MINIMUM = SPARSE_MINIMUM.reshape(SHAPE)
TICKET = SPARSE_MINIMUM != 0
TICKET.flat[np.setdiff1d(np.arange(64), NEEDED)[:6]] = True

TOPOLOGIES = {
    "static": (agent_optax.static(), {"masks": TICKET}),
    "set_": (agent_optax.set_(10, 0.25, stop=1900), {"sparsity": SPARSITY}),
    "rigl": (agent_optax.rigl(10, 0.25, stop=1900), {"sparsity": SPARSITY}),
}
SPARSE_INNER = {
    "momentum": optax.sgd(0.1, momentum=0.5),
    "adam": optax.adam(optax.cosine_decay_schedule(0.05, 2000)),
    "agent": agent_optax.agent(0.1, momentum=0.5, weight_decay=0.0),
    "saga": corrected_sgd(agent_optax.table(NUM_BATCHES))(0.2),
}


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("inner", SPARSE_INNER)
def test_finds_the_active_weights_and_their_values(inner: str, topology: str) -> None:
    wires, arguments = TOPOLOGIES[topology]
    tx = agent_optax.sparsify(SPARSE_INNER[inner], wires, **arguments)
    noise = 0.01 * jax.random.normal(jax.random.key(2), (NUM_BATCHES, *SHAPE))
    noise = noise - jnp.mean(noise, 0)
    start = jax.random.normal(jax.random.key(3), SHAPE)
    params, opt_state = run(
        tx, lambda params: 0.5 * jnp.sum((params - SPARSE_MINIMUM) ** 2), start, noise, num_epochs=40, num_steps=50
    )
    np.testing.assert_allclose(params, SPARSE_MINIMUM, atol=3e-2)
    assert jnp.sum(agent_optax.active_masks(opt_state, params)) == 16
