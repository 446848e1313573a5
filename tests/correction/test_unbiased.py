"""The corrected gradient is unbiased, and the measured coefficient does not raise its variance: statistical tests.

Each test states how often it fails by chance. Seeds are fixed, so a test that passes goes on passing; the rate is that
over seeds.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import agent_optax

NUM_SAMPLES, BATCH_SIZE, NUM_BATCHES = 256, 8, 32
NUM_DRAWS = 20_000
# A standard normal variable exceeds 4.9 with probability 4.8e-7.
Z = 4.9


@functools.cache
def data():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(NUM_SAMPLES, 6))
    labels = np.sin(inputs @ rng.normal(size=(6, 2))) + 0.3 * rng.normal(size=(NUM_SAMPLES, 2))
    return jnp.asarray(inputs), jnp.asarray(labels)


def loss_fn(params, batch):
    inputs, labels = batch
    return jnp.mean((jnp.tanh(inputs @ params["first"]) @ params["second"] - labels) ** 2)


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    return {"first": jnp.asarray(rng.normal(size=(6, 5)) * 0.5), "second": jnp.asarray(rng.normal(size=(5, 2)) * 0.5)}


def flat(tree):
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def take(indices):
    return jax.tree.map(lambda leaf: leaf[indices], data())


def draw(key):
    """A batch drawn with replacement from the samples."""
    return take(jax.random.randint(key, (BATCH_SIZE,), 0, NUM_SAMPLES))


def all_batches():
    return jax.tree.map(lambda leaf: leaf.reshape(NUM_BATCHES, BATCH_SIZE, *leaf.shape[1:]), data())


def trained(coefficient, num_steps, memory=None, num_epochs=2):
    """An optimizer in the middle of a run: a few epochs of steps, then `num_steps` steps after a refresh."""
    memory = agent_optax.snapshot() if memory is None else memory
    correction = agent_optax.correct_gradients(memory, coefficient, scaling=1.0)
    tx = optax.chain(correction, optax.sgd(0.05))

    @jax.jit
    def step(carry, key):
        params, opt_state = carry
        (_, grads), extras = agent_optax.value_and_grads(loss_fn)(params, opt_state, draw(key))
        updates, opt_state = tx.update(grads, opt_state, params, **extras)
        return (optax.apply_updates(params, updates), opt_state), None

    params = make_params()
    opt_state = tx.init(params)
    for epoch in range(num_epochs):
        opt_state = agent_optax.refresh(loss_fn, params, opt_state, all_batches())
        keys = jax.random.split(jax.random.key(epoch), NUM_BATCHES if epoch < num_epochs - 1 else num_steps)
        (params, opt_state), _ = jax.lax.scan(step, (params, opt_state), keys)
    return correction, params, opt_state[0]


def sampler(correction):
    """Raw and corrected gradients of NUM_DRAWS batches at one state, [draws, entries]."""

    def one(params, opt_state, key):
        (_, grads), extras = agent_optax.value_and_grads(loss_fn)(params, opt_state, draw(key))
        estimate, _ = correction.update(grads, opt_state, params, **extras)
        return flat(grads), flat(estimate)

    keys = jax.random.split(jax.random.key(1), NUM_DRAWS)
    return jax.jit(lambda params, opt_state: jax.vmap(one, (None, None, 0))(params, opt_state, keys))


def largest_z(estimates, mean):
    """The largest of the entries' z scores against their known mean."""
    deviations = estimates - mean
    return jnp.max(jnp.abs(deviations.mean(0)) / (deviations.std(0) / np.sqrt(len(estimates))))


UNBIASED = {
    "constant": lambda: agent_optax.constant(1.0),
    "loss regression": lambda: agent_optax.loss_regression(smoothing=1.0),
    "gradient regression": lambda: agent_optax.gradient_regression(),
    "one a leaf": lambda: agent_optax.gradient_regression(scope="leaf"),
    "scheduled": lambda: agent_optax.scheduled(lambda position: 0.75 - 0.2 * position),
}


@pytest.mark.parametrize("make", UNBIASED.values(), ids=UNBIASED)
def test_the_mean_of_the_estimate_is_the_full_gradient(x64, make):
    """Entry by entry. False alarms: 40 entries, two-sided, 4e-5 of seeds; means of 20,000 draws are normal."""
    correction, params, opt_state = trained(make(), num_steps=12)
    full = flat(jax.grad(loss_fn)(params, data()))
    weight = agent_optax.diagnostics(opt_state)["correction_weight"]
    assert weight > 0.2  # there is a correction
    draws = sampler(correction)
    raw, estimates = draws(params, opt_state)
    assert largest_z(estimates, full) < Z
    # The test would see a mean gradient that is off by a hundredth of its length.
    memory = opt_state.memory_state
    off = opt_state._replace(
        memory_state=memory._replace(mean_grads=jax.tree.map(lambda m: 1.05 * m, memory.mean_grads))
    )
    _, biased = draws(params, off)
    assert largest_z(biased, full) > Z
    assert largest_z(raw, full) < Z


def test_over_the_batches_of_the_pass_the_mean_is_exact(x64):
    """With fixed batches there is nothing to draw: the average over the pass is the full gradient, to rounding."""
    for memory in (agent_optax.snapshot(), agent_optax.snapshot(NUM_BATCHES)):
        correction = agent_optax.correct_gradients(memory, agent_optax.constant(0.8), scaling=1.0)
        start, params = make_params(), make_params(1)
        opt_state = agent_optax.refresh(loss_fn, start, correction.init(start), all_batches())
        estimates = []
        for index in range(NUM_BATCHES):
            batch = jax.tree.map(lambda leaf: leaf[index], all_batches())  # noqa: B023
            (_, grads), extras = agent_optax.value_and_grads(loss_fn)(params, opt_state, batch)
            estimates.append(flat(correction.update(grads, opt_state, params, batch_index=index, **extras)[0]))
        full = flat(jax.grad(loss_fn)(params, data()))
        np.testing.assert_allclose(np.mean(estimates, 0), full, rtol=0, atol=1e-14)
        assert np.abs(estimates[0] - full).max() > 1e-2


def variance_excess(raw, estimates, mean):
    """The z score of Var(corrected) - Var(raw), over pairs of draws, and the ratio of the variances."""
    squares = jnp.sum((estimates - mean) ** 2, 1), jnp.sum((raw - mean) ** 2, 1)
    difference = squares[0] - squares[1]
    error = difference.std() / np.sqrt(len(raw))
    z = difference.mean() / error if error > 0 else 0.0  # with a weight of 0 the two are the same
    return z, squares[0].mean() / squares[1].mean()


@pytest.mark.parametrize("num_steps", [1, 4, 16, 64, 256])
@pytest.mark.parametrize("scope", ["all", "leaf"])
def test_gradient_regression_does_not_raise_the_variance(x64, num_steps, scope):
    """At any distance from the refresh, beyond sampling error. False alarms: one-sided, 5e-7 of seeds."""
    coefficient = agent_optax.gradient_regression(decay=0.9, scope=scope)
    correction, params, opt_state = trained(coefficient, num_steps)
    full = flat(jax.grad(loss_fn)(params, data()))
    z, ratio = variance_excess(*sampler(correction)(params, opt_state), full)
    assert z < Z
    assert ratio < 1


def test_a_weight_that_is_too_large_does_raise_it(x64):
    """What the test above would see: with an old gradient that has little to do with the new one c = 1 costs variance.

    The regression notices, in 40 steps.
    """
    snapshot, params = jax.tree.map(lambda p: 3 * p, make_params(3)), make_params()
    full = flat(jax.grad(loss_fn)(params, data()))
    excess = {}
    for name, coefficient in (("one", agent_optax.constant(1.0)), ("regression", agent_optax.gradient_regression(0.9))):
        correction = agent_optax.correct_gradients(agent_optax.snapshot(), coefficient, scaling=1.0)
        opt_state = agent_optax.refresh(loss_fn, snapshot, correction.init(snapshot), all_batches())
        for key in jax.random.split(jax.random.key(4), 40):
            (_, grads), extras = agent_optax.value_and_grads(loss_fn)(params, opt_state, draw(key))
            _, opt_state = jax.jit(correction.update)(grads, opt_state, params, **extras)
        excess[name] = variance_excess(*sampler(correction)(params, opt_state), full)
    assert excess["one"][0] > Z and excess["one"][1] > 1.1
    assert excess["regression"][0] < Z and excess["regression"][1] < 1.01
