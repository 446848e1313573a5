"""Scheduled coefficients: what the position counts, and alpha-SVRG's decay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import jit

import agent_optax

BATCHES = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 2)), jnp.float32)


def loss_fn(params, batch):
    return jnp.mean((batch - params) ** 2)


def positions(tx, params, num_epochs, refreshes):
    """The coefficient of each step, in epochs that begin with a refresh if there is one."""
    opt_state, used = tx.init(params), []
    update = jit(tx.update)
    for _ in range(num_epochs):
        if refreshes:
            opt_state = agent_optax.refresh(loss_fn, params, opt_state, BATCHES)
        for index, batch in enumerate(BATCHES):
            (_, grads), extras = agent_optax.value_and_grads(loss_fn)(params, opt_state, batch)
            _, opt_state = update(grads, opt_state, params, batch_index=index, **extras)
            used.append(float(agent_optax.diagnostics(opt_state)["correlation"]))
    return used


REFRESHED = {"snapshot": agent_optax.snapshot(), "cached": agent_optax.snapshot(len(BATCHES))}
STEPPED = {
    "recursion": agent_optax.recursion(),
    "table": agent_optax.table(len(BATCHES)),
    "history": agent_optax.history(),
    "difference": agent_optax.difference(),
}


@pytest.mark.parametrize("memory", REFRESHED.values(), ids=REFRESHED)
def test_refreshes_count_where_there_are_any(memory):
    tx = agent_optax.correct_gradients(memory, agent_optax.scheduled(lambda position: 10.0 + position))
    assert positions(tx, jnp.zeros(2), 3, refreshes=True) == [10, 10, 10, 11, 11, 11, 12, 12, 12]


@pytest.mark.parametrize("memory", STEPPED.values(), ids=STEPPED)
def test_steps_count_elsewhere(memory):
    tx = agent_optax.correct_gradients(memory, agent_optax.scheduled(lambda position: 10.0 + position))
    assert positions(tx, jnp.zeros(2), 2, refreshes=False) == [10, 11, 12, 13, 14, 15]


def test_the_estimate_uses_the_coefficient_of_its_own_position(x64):
    """The first step after a refresh already has the new one."""
    tx = agent_optax.correct_gradients(coefficient=agent_optax.scheduled(lambda position: 0.25 + position), scaling=2.0)
    first, now = jnp.asarray([1.0, -1.0]), jnp.asarray([0.5, 2.0])
    batches = jnp.asarray(BATCHES, jnp.float64) ** 3  # equal Hessians would hide the weight: make the loss another one

    def loss(params, batch):
        return jnp.mean(jnp.log(jnp.cosh(batch * params)))

    opt_state = tx.init(first)
    for weight in (0.5, 2.5, 4.5):
        opt_state = agent_optax.refresh(loss, first, opt_state, batches)
        grads, old = jax.grad(loss)(now, batches[1]), jax.grad(loss)(first, batches[1])
        mean = jnp.mean(jnp.stack([jax.grad(loss)(first, batch) for batch in batches]), 0)
        estimate, opt_state = jit(tx.update)(grads, opt_state, now, old_grads=old)
        np.testing.assert_allclose(estimate, grads - weight * (old - mean), rtol=1e-12)


@pytest.mark.parametrize("num_refreshes", [1, 2, 5])
def test_alpha_svrg_decays_as_the_authors_have_it(num_refreshes):
    """numpy.linspace(initial, 0, number of snapshots), one value a snapshot, and 0 from then on."""
    tx = agent_optax.alpha_svrg(0.1, num_refreshes, initial=0.6)
    expected = np.repeat([*np.linspace(0.6, 0, num_refreshes), 0.0, 0.0], len(BATCHES))
    used = positions(tx, jnp.zeros(2), num_refreshes + 2, refreshes=True)
    np.testing.assert_allclose(used, expected, rtol=1e-6)


def test_alpha_svrg_is_a_chain_of_parts():
    params = jnp.asarray([1.0, -1.0])
    tx = optax.chain(
        agent_optax.correct_gradients(
            coefficient=agent_optax.scheduled(optax.linear_schedule(0.75, 0.0, 3)), scaling=1.0
        ),
        optax.sgd(0.1, momentum=0.9),
    )
    runs = []
    for optimizer in (tx, agent_optax.alpha_svrg(0.1, num_refreshes=4, momentum=0.9)):
        p, opt_state = params, optimizer.init(params)
        for _ in range(4):
            opt_state = agent_optax.refresh(loss_fn, p, opt_state, BATCHES)
            for batch in BATCHES:
                (_, grads), extras = agent_optax.value_and_grads(loss_fn)(p, opt_state, batch)
                updates, opt_state = jit(optimizer.update)(grads, opt_state, p, **extras)
                p = optax.apply_updates(p, updates)
        runs.append(p)
    np.testing.assert_allclose(*runs, rtol=1e-6)


def test_nothing_is_measured():
    opt_state = agent_optax.alpha_svrg(0.1, num_refreshes=4).init(jnp.zeros(2))
    report = agent_optax.diagnostics(opt_state)
    assert report["variance_ratio"] == 1 and not report["variance_ratio_known"]
    num_evaluations = 0

    def counted(params, batch):
        nonlocal num_evaluations
        num_evaluations += 1
        return loss_fn(params, batch)

    agent_optax.refresh(counted, jnp.zeros(2), opt_state, BATCHES)
    assert num_evaluations == 1  # no loss at the old snapshot


def test_errors_name_the_fix():
    with pytest.raises(TypeError, match=r"schedule must be a function of the position.*got 0\.5.*constant\(0\.5\)"):
        agent_optax.scheduled(0.5)
    with pytest.raises(ValueError, match=r"initial must lie in \[0, 1\], got 1\.5"):
        agent_optax.alpha_svrg(0.1, 10, initial=1.5)
    for wrong in (0, 2.5):
        with pytest.raises(ValueError, match=rf"num_refreshes must be a whole number of at least 1, got {wrong}"):
            agent_optax.alpha_svrg(0.1, num_refreshes=wrong)


def test_a_hyperparameter_that_changes_holds_from_the_next_step_on():
    """Under inject_hyperparams a constant coefficient, like a learning rate, is that of the step at hand."""
    make = optax.inject_hyperparams(
        lambda c: agent_optax.correct_gradients(agent_optax.table(2), agent_optax.constant(c), scaling=1.0)
    )
    tx = make(c=lambda step: jnp.asarray([0.0, 0.0, 0.5, 1.0])[step])
    opt_state = tx.init(jnp.zeros(1))
    steps = [(0, 4.0, 4.0), (1, 8.0, 8.0), (0, 5.0, 5 - 0.5 * (4 - 6)), (0, 5.0, 5 - (5 - 6.5))]
    for index, grad, expected in steps:
        estimate, opt_state = tx.update(jnp.full(1, grad), opt_state, batch_index=index)
        assert estimate == expected
