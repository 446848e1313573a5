"""What each memory is for: where SGD stalls at a noise floor, at the same constant step, and where these get to.

The problem is logistic regression with an L2 term: smooth and strongly convex, so the theorems of SVRG and SAGA hold.
Batches are drawn with replacement, as the theorems have it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import agent_optax

NUM_BATCHES, BATCH_SIZE, DIMENSION, PENALTY = 20, 10, 15, 0.05
LEARNING_RATE, NUM_EPOCHS = 1.0, 60
ROUNDING = 1e-13  # suboptimality, of losses near 0.5, at which double precision ends


@functools.cache
def problem():
    """Stacked batches (inputs, labels), and the least loss, by Newton's method."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(NUM_BATCHES, BATCH_SIZE, DIMENSION)) * np.linspace(0.3, 1.0, DIMENSION)
    labels = np.sign(inputs @ rng.normal(size=DIMENSION) + rng.normal(size=(NUM_BATCHES, BATCH_SIZE)))
    batches = jnp.asarray(inputs), jnp.asarray(labels)
    params = jnp.zeros(DIMENSION)
    for _ in range(20):
        step = jnp.linalg.solve(jax.hessian(full_loss)(params, batches), jax.grad(full_loss)(params, batches))
        params = params - step
    assert jnp.linalg.norm(jax.grad(full_loss)(params, batches)) < 1e-14
    return batches, full_loss(params, batches)


def loss_fn(params, batch):
    inputs, labels = batch
    return jnp.mean(jnp.logaddexp(0, -labels * (inputs @ params))) + PENALTY / 2 * jnp.sum(params**2)


def full_loss(params, batches):
    return jnp.mean(jax.vmap(loss_fn, (None, 0))(params, batches))


def suboptimality(tx, refreshes=False, seed=0):
    """Loss above the least loss after each epoch."""
    batches, least = problem()

    def epoch(carry, key):
        params, opt_state = carry
        if refreshes:
            opt_state = agent_optax.refresh(loss_fn, params, opt_state, batches)

        def step(carry, index):
            params, opt_state = carry
            batch = jax.tree.map(lambda leaf: leaf[index], batches)
            (_, grads), extras = agent_optax.value_and_grads(loss_fn)(params, opt_state, batch)
            updates, opt_state = tx.update(grads, opt_state, params, batch_index=index, **extras)
            return (optax.apply_updates(params, updates), opt_state), None

        indices = jax.random.randint(key, (NUM_BATCHES,), 0, NUM_BATCHES)
        (params, opt_state), _ = jax.lax.scan(step, (params, opt_state), indices)
        return (params, opt_state), full_loss(params, batches) - least

    @jax.jit
    def run(keys):
        params = jnp.zeros(DIMENSION)
        return jax.lax.scan(epoch, (params, tx.init(params)), keys)[1]

    return np.asarray(run(jax.random.split(jax.random.key(seed), NUM_EPOCHS)))


def corrected(memory, coefficient):
    return optax.chain(agent_optax.correct_gradients(memory, coefficient, scaling=1.0), optax.sgd(LEARNING_RATE))


@functools.cache
def noise_floor():
    """The median suboptimality of SGD in the second half of the run, over three seeds."""
    runs = [suboptimality(optax.sgd(LEARNING_RATE), seed=seed) for seed in range(3)]
    floor = np.median([run[NUM_EPOCHS // 2 :] for run in runs])
    assert 1e-3 < floor < 1e-1  # it stalls, and well above rounding
    for run in runs:
        assert np.median(run[NUM_EPOCHS // 2 :]) > np.median(run[NUM_EPOCHS // 4 : NUM_EPOCHS // 2]) / 2
    return floor


LINEAR = {
    "SVRG": (lambda: agent_optax.svrg(LEARNING_RATE), True),
    "SVRG, cached": (lambda: corrected(agent_optax.snapshot(NUM_BATCHES), agent_optax.constant(1.0)), True),
    "SAGA": (lambda: corrected(agent_optax.table(NUM_BATCHES), agent_optax.constant(1.0)), False),
    "SVRG, gradient regression": (lambda: corrected(agent_optax.snapshot(), agent_optax.gradient_regression()), True),
    "SAGA, gradient regression": (
        lambda: corrected(agent_optax.table(NUM_BATCHES), agent_optax.gradient_regression()),
        False,
    ),
    "SVRG, loss regression": (lambda: corrected(agent_optax.snapshot(), agent_optax.loss_regression(1.0)), True),
}


@pytest.mark.parametrize("make, refreshes", LINEAR.values(), ids=LINEAR)
def test_linear_convergence_through_the_noise_floor_of_sgd(x64, make, refreshes):
    """To rounding, on a line: each ten epochs divide the suboptimality, until rounding, by ten at least."""
    run = suboptimality(make(), refreshes)
    assert run[-1] < ROUNDING < noise_floor() * 1e-9
    every_ten = run[::10]
    above = every_ten > 10 * ROUNDING
    ratios = every_ten[1:][above[1:]] / every_ten[:-1][above[1:]]
    assert np.all(ratios < 0.1)


def test_storm_lowers_the_noise_floor(x64):
    """At a constant a it has one itself: not linear convergence, but an order of magnitude.

    The error of the estimate is a moving average over 1 / a steps, and the parameters one over 1 / (rate x curvature),
    here about 10: the floor falls when the first is the longer, roughly as 1 / (1 + rate x curvature / a).
    """
    floors = {}
    for a in (0.3, 0.01):
        runs = [suboptimality(agent_optax.storm(LEARNING_RATE, a), seed=seed) for seed in range(3)]
        floors[a] = np.median([run[NUM_EPOCHS // 2 :] for run in runs])
    assert floors[0.3] < noise_floor()
    assert ROUNDING * 1e6 < floors[0.01] < noise_floor() / 8


def test_storm_with_a_falling_a_has_no_noise_floor(x64):
    """With a = 1 / t the error of the estimate averages out, at the rate of an average."""
    run = suboptimality(agent_optax.storm(LEARNING_RATE, lambda step: 1 / (1 + step)))
    early, late = np.median(run[5:15]), np.median(run[-10:])
    assert late < early / 3 and late < noise_floor() / 30


def test_storm_that_forgets_nothing_keeps_its_first_error(x64):
    """a = 0 is no way to reduce variance: the first estimate is one batch's gradient, and its error stays."""
    run = suboptimality(agent_optax.storm(LEARNING_RATE, a=0.0))
    assert run[-1] > 3 * noise_floor()
    np.testing.assert_allclose(run[-1], run[-20], rtol=1e-2)
