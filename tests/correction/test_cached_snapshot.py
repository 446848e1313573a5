"""A snapshot that keeps each batch's gradient: the same estimates as without, from one gradient a step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import jit

import agent_optax

NUM_BATCHES, BATCH_SIZE, NUM_EPOCHS = 5, 4, 4


def loss_fn(params, batch):
    return jnp.mean(jnp.log(jnp.cosh(batch @ params["kernel"] + params["bias"])))


def make_params(dtype=np.float32):
    rng = np.random.default_rng(0)
    return {"kernel": jnp.asarray(rng.normal(size=(4, 3)), dtype), "bias": jnp.asarray(rng.normal(size=3), dtype)}


def make_batches(dtype=np.float32):
    return jnp.asarray(np.random.default_rng(1).normal(size=(NUM_BATCHES, BATCH_SIZE, 4)), dtype)


def correction(memory, coefficient, scaling=0.7):
    return agent_optax.correct_gradients(memory, coefficient, scaling)


def assert_trees_close(actual, expected, rtol=1e-10, atol=1e-12):
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=rtol, atol=atol), actual, expected)


COEFFICIENTS = {
    "constant": lambda: agent_optax.constant(1.0),
    "loss regression": lambda: agent_optax.loss_regression(smoothing=0.6),
    "gradient regression": lambda: agent_optax.gradient_regression(),
    "one a leaf": lambda: agent_optax.gradient_regression(scope="leaf"),
    "scheduled": lambda: agent_optax.scheduled(lambda position: 0.8 - 0.2 * position),
}


def train(memory, coefficient, params, batches, way="scanned", sparse=None):
    """Epochs of a refresh and a shuffled pass; the parameters after each step."""
    tx = optax.chain(correction(memory, coefficient), optax.sgd(0.5, momentum=0.5))
    tx = sparse(tx) if sparse else tx
    opt_state, history = tx.init(params), []
    params = agent_optax.mask_params(params, opt_state) if sparse else params

    @jit
    def step(params, opt_state, index):
        (_, grads), extras = agent_optax.value_and_grads(loss_fn)(params, opt_state, batches[index])
        updates, opt_state = tx.update(grads, opt_state, params, batch_index=index, **extras)
        return optax.apply_updates(params, updates), opt_state

    for epoch in range(NUM_EPOCHS):
        opt_state = agent_optax.refresh(
            loss_fn, params, opt_state, batches if way == "scanned" else iter(list(batches))
        )
        for index in np.random.default_rng(epoch).permutation(NUM_BATCHES):
            params, opt_state = step(params, opt_state, index)
            history.append(params)
    return history, opt_state


@pytest.mark.parametrize("way", ["scanned", "iterator"])
@pytest.mark.parametrize("coefficient", COEFFICIENTS.values(), ids=COEFFICIENTS)
def test_estimates_are_those_of_the_plain_snapshot(x64, coefficient, way):
    params, batches = make_params(np.float64), make_batches(np.float64)
    cached, cached_state = train(agent_optax.snapshot(NUM_BATCHES), coefficient(), params, batches, way)
    plain, plain_state = train(agent_optax.snapshot(), coefficient(), params, batches)
    assert_trees_close(cached, plain)
    assert_trees_close(agent_optax.diagnostics(cached_state), agent_optax.diagnostics(plain_state))
    assert agent_optax.diagnostics(cached_state)["correlation"] > 0.1


@pytest.mark.parametrize("storage", ["dense", "compact"])
def test_under_a_growing_topology_too(x64, storage):
    params, batches = make_params(np.float64), make_batches(np.float64)

    def sparse(inner):
        topology = agent_optax.rigl(update_every=3, drop_fraction=0.5)
        return agent_optax.sparsify(inner, topology, sparsity=0.5, storage=storage)

    arguments = (agent_optax.gradient_regression(), params, batches, "scanned", sparse)
    cached, cached_state = train(agent_optax.snapshot(NUM_BATCHES), *arguments)
    plain, plain_state = train(agent_optax.snapshot(), *arguments)
    assert_trees_close(cached, plain)
    assert_trees_close(agent_optax.diagnostics(cached_state), agent_optax.diagnostics(plain_state))
    assert agent_optax.diagnostics(cached_state)["exploration_rate"] > 0.5


def test_the_refresh_pass_keeps_gradients_and_losses():
    params, batches = make_params(), make_batches()
    tx = correction(agent_optax.snapshot(NUM_BATCHES), agent_optax.constant(1.0))
    for way in (batches, iter(list(batches))):
        memory = agent_optax.refresh(loss_fn, params, tx.init(params), way).memory_state
        for index, batch in enumerate(batches):
            value, grads = jax.value_and_grad(loss_fn)(params, batch)
            row = jax.tree.map(lambda leaf: leaf[index], memory.cached_grads)  # noqa: B023
            assert_trees_close(row, grads, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(memory.cached_losses[index], value, rtol=1e-6)


class Counted:
    """A loss that counts how often it is traced."""

    def __init__(self):
        self.num_evaluations = 0

    def __call__(self, params, batch):
        self.num_evaluations += 1
        return loss_fn(params, batch)


def test_one_gradient_a_step_and_one_evaluation_a_batch_of_the_pass():
    params, batches = make_params(), make_batches()
    counts = {}
    for name, memory in {"plain": agent_optax.snapshot(), "cached": agent_optax.snapshot(NUM_BATCHES)}.items():
        opt_state = correction(memory, agent_optax.loss_regression()).init(params)
        of_pass, of_step = Counted(), Counted()
        opt_state = agent_optax.refresh(of_pass, params, opt_state, iter([batches[0]] * NUM_BATCHES))
        (_, _), extras = agent_optax.value_and_grads(of_step)(params, opt_state, batches[0])
        counts[name] = (of_pass.num_evaluations, of_step.num_evaluations, sorted(extras))
    assert counts == {"plain": (2, 2, ["old_grads", "old_value", "value"]), "cached": (1, 1, ["value"])}


def test_nothing_is_corrected_before_the_first_refresh():
    params = make_params()
    tx = correction(agent_optax.snapshot(NUM_BATCHES), agent_optax.constant(1.0))
    estimate, _ = tx.update(params, tx.init(params), batch_index=2)
    assert_trees_close(estimate, params, rtol=0, atol=0)


def test_an_index_out_of_range():
    params, batches = make_params(), make_batches()
    tx = correction(agent_optax.snapshot(NUM_BATCHES), agent_optax.constant(1.0))
    opt_state = agent_optax.refresh(loss_fn, params, tx.init(params), batches)
    with pytest.raises(ValueError, match=r"batch_index must lie in 0 \.\.\. 4, got 5: .*snapshot\(cached_batches=5\)"):
        tx.update(params, opt_state, batch_index=5)
    with pytest.raises(ValueError, match=r"snapshot\(cached_batches=5\)\) needs the extra argument batch_index="):
        tx.update(params, opt_state)
    estimate, after = jit(tx.update)(params, opt_state, batch_index=5)
    assert_trees_close(estimate, params, rtol=0, atol=0)
    assert_trees_close(after, opt_state, rtol=0, atol=0)


@pytest.mark.parametrize("num_batches", [1, 4, 6])
def test_a_pass_of_another_length_is_refused(num_batches):
    params, batches = make_params(), jnp.concatenate([make_batches()] * 2)[:num_batches]
    opt_state = correction(agent_optax.snapshot(NUM_BATCHES), agent_optax.constant(1.0)).init(params)
    for way in (batches, iter(list(batches))):
        with pytest.raises(ValueError, match=rf"pass has (at least )?{num_batches} batches, but .*cached_batches=5\)"):
            agent_optax.refresh(loss_fn, params, opt_state, way)


def test_an_endless_loader_is_refused_at_the_first_batch_too_many():
    params, batches = make_params(), make_batches()
    opt_state = correction(agent_optax.snapshot(NUM_BATCHES), agent_optax.constant(1.0)).init(params)

    def endless():
        while True:
            yield batches[0]

    with pytest.raises(ValueError, match=r"pass has at least 6 batches"):
        agent_optax.refresh(loss_fn, params, opt_state, endless())


@pytest.mark.parametrize("way", ["scanned", "iterator"])
def test_a_pass_that_is_not_finite_changes_nothing(way):
    params, batches = make_params(), make_batches()
    tx = correction(agent_optax.snapshot(NUM_BATCHES), agent_optax.loss_regression())
    opt_state = agent_optax.refresh(loss_fn, params, tx.init(params), batches)
    opt_state = agent_optax.refresh(loss_fn, jax.tree.map(lambda p: 0.9 * p, params), opt_state, batches)
    spoilt = batches.at[3, 1, 2].set(jnp.nan)
    after = agent_optax.refresh(loss_fn, params, opt_state, spoilt if way == "scanned" else iter(list(spoilt)))
    assert_trees_close(after, opt_state, rtol=0, atol=0)


@pytest.mark.parametrize("wrong", [0, -1, 2.5, True])
def test_the_number_of_batches_is_checked(wrong):
    with pytest.raises(ValueError, match=rf"cached_batches must be a whole number of at least 1, got {wrong}"):
        agent_optax.snapshot(cached_batches=wrong)


def test_masked_leaves_have_no_rows():
    params, batches = make_params(), make_batches()
    memory, coefficient = agent_optax.snapshot(NUM_BATCHES), agent_optax.constant(1.0)
    tx = optax.masked(correction(memory, coefficient, 1.0), {"kernel": False, "bias": True})
    opt_state = agent_optax.refresh(loss_fn, params, tx.init(params), batches)
    assert len(jax.tree.leaves(optax.tree.get(opt_state, "cached_grads"))) == 1
    grads = jax.grad(loss_fn)(params, batches[1])
    estimate, _ = tx.update(grads, opt_state, params, batch_index=1)
    full = jax.grad(loss_fn)(params, batches.reshape(-1, 4))
    assert_trees_close(estimate["bias"], full["bias"], rtol=1e-5, atol=1e-6)  # at the snapshot: the mean itself
    assert_trees_close(estimate["kernel"], grads["kernel"], rtol=0, atol=0)
