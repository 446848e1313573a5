"""Every memory with every coefficient: steps, spoilt steps, low precision, hidden leaves, accumulated gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import jit

import agent_optax

NUM_BATCHES, NUM_STEPS = 3, 8
BATCHES = np.random.default_rng(0).normal(size=(NUM_BATCHES, 6, 4)).astype(np.float32)

MEMORIES = {
    "snapshot": agent_optax.snapshot,
    "cached": lambda: agent_optax.snapshot(NUM_BATCHES),
    "recursion": agent_optax.recursion,
    "table": lambda: agent_optax.table(NUM_BATCHES),
    "history": agent_optax.history,
    "difference": agent_optax.difference,
    "exact difference": lambda: agent_optax.difference(exact=True),
}
COEFFICIENTS = {
    "constant": lambda: agent_optax.constant(0.8),
    "loss": agent_optax.loss_regression,
    "gradient": agent_optax.gradient_regression,
    "leaf": lambda: agent_optax.gradient_regression(scope="leaf"),
    "scheduled": lambda: agent_optax.scheduled(lambda position: 0.9 / (1 + position)),
}
every_pair = pytest.mark.parametrize("memory, coefficient", [*itertools.product(MEMORIES, COEFFICIENTS)])
every_memory = pytest.mark.parametrize("memory", MEMORIES)


def loss_fn(params, batch):
    return jnp.mean(jnp.log(jnp.cosh(batch.astype(params["kernel"].dtype) @ params["kernel"] + params["bias"])))


def make_params(dtype=np.float32):
    rng = np.random.default_rng(1)
    return {"kernel": jnp.asarray(rng.normal(size=(4, 3)), dtype), "bias": jnp.asarray(rng.normal(size=3), dtype)}


def correction(memory, coefficient, scaling=0.9):
    return agent_optax.correct_gradients(MEMORIES[memory](), COEFFICIENTS[coefficient](), scaling)


def refreshed(memory, params, opt_state):
    if memory in ("snapshot", "cached"):
        opt_state = agent_optax.refresh(loss_fn, params, opt_state, jnp.asarray(BATCHES))
    return opt_state


def step(tx, params, opt_state, index, spoil=1.0):
    (_, grads), extras = agent_optax.value_and_grads(loss_fn)(params, opt_state, jnp.asarray(BATCHES)[index])
    grads, extras = jax.tree.map(lambda leaf: leaf * jnp.asarray(spoil, leaf.dtype), (grads, extras))
    return tx.update(grads, opt_state, params, batch_index=index, **extras)


@every_pair
def test_a_spoilt_step_does_not_spoil_the_next(memory, coefficient):
    """Gradients and losses that are not finite give an estimate that is not, once, and the state recovers."""
    tx, params = correction(memory, coefficient), make_params()
    one = jit(lambda params, opt_state, index, spoil: step(tx, params, opt_state, index, spoil))
    opt_state, start = tx.init(params), params
    for index in range(NUM_STEPS):
        opt_state = refreshed(memory, params, opt_state) if index % NUM_BATCHES == 0 else opt_state
        spoil = {3: jnp.nan, 5: jnp.inf}.get(index, 1.0)
        estimate, opt_state = one(params, opt_state, index % NUM_BATCHES, spoil)
        is_finite = all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(estimate))
        assert is_finite == (spoil == 1.0)
        if is_finite:
            params = jax.tree.map(lambda p, d: p - 0.3 * d, params, estimate)
        for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state):
            if "loss" not in jax.tree_util.keystr(path):  # nan stands for a loss that was never told
                assert np.all(np.isfinite(leaf)), path
    assert np.isfinite(agent_optax.diagnostics(opt_state)["correlation"])
    assert loss_fn(params, BATCHES[0]) < loss_fn(start, BATCHES[0])


@every_pair
def test_bf16(memory, coefficient):
    """Estimates keep the gradient's dtype, the state keeps its dtypes, and statistics are float32."""
    tx, params = correction(memory, coefficient), make_params(jnp.bfloat16)
    opt_state = refreshed(memory, params, tx.init(params))
    start = jax.tree.map(lambda leaf: leaf.dtype, opt_state)
    one = jit(lambda opt_state, index: step(tx, params, opt_state, index))
    for index in range(4):
        estimate, opt_state = one(opt_state, index % NUM_BATCHES)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(estimate))
    assert jax.tree.map(lambda leaf: leaf.dtype, opt_state) == start
    assert all(leaf.dtype != jnp.bfloat16 for leaf in jax.tree.leaves(opt_state.coefficient_state))


@every_memory
def test_with_a_weight_of_zero_it_is_the_gradient(memory):
    params = make_params()
    tx = agent_optax.correct_gradients(MEMORIES[memory](), agent_optax.constant(1.0), scaling=0.0)
    opt_state = refreshed(memory, params, tx.init(params))
    for index in range(4):
        estimate, opt_state = step(tx, params, opt_state, index % NUM_BATCHES)
        expected = jax.grad(loss_fn)(params, BATCHES[index % NUM_BATCHES])
        jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-7), estimate, expected)


@every_memory
def test_hidden_leaves_inside_a_sparse_optimizer(memory):
    """`optax.masked` between `sparsify` and the correction: its leaf is corrected as without the others."""
    params, runs = make_params(), []
    for hides in (False, True):
        inner = correction(memory, "constant")
        inner = optax.masked(inner, {"kernel": True, "bias": False}) if hides else inner
        topology = agent_optax.rigl(update_every=4, drop_fraction=0.5)
        tx = agent_optax.sparsify(optax.chain(inner, optax.sgd(0.2)), topology, sparsity=0.5)
        opt_state = tx.init(params)
        p = agent_optax.mask_params(params, opt_state)
        opt_state = refreshed(memory, p, opt_state)
        grads = jax.tree.map(lambda leaf: jnp.zeros_like(leaf), p)
        for index in range(NUM_STEPS):
            batch = BATCHES[index % NUM_BATCHES]
            (_, raw), extras = agent_optax.value_and_grads(loss_fn)(p, opt_state, batch)
            grads["kernel"] = raw["kernel"]
            if "old_grads" in extras:  # the bias is held, so both runs see the same kernel's gradients
                extras["old_grads"] = {**extras["old_grads"], "bias": grads["bias"]}
            updates, opt_state = jit(tx.update)(grads, opt_state, p, batch_index=index % NUM_BATCHES, **extras)
            p = {**p, "kernel": p["kernel"] + updates["kernel"]}
        runs.append(p["kernel"])
    np.testing.assert_allclose(*runs, rtol=1e-5, atol=1e-6)
    assert np.abs(runs[0] - params["kernel"]).max() > 0.1


@every_memory
def test_accumulation_after_the_correction_averages_estimates(memory):
    """`chain(correct_gradients, MultiSteps(sgd, k))` corrects each micro-batch; the step is their mean."""
    params = make_params()
    accumulating = optax.chain(correction(memory, "constant"), optax.MultiSteps(optax.sgd(0.5), 2))
    alone = correction(memory, "constant")
    states = [refreshed(memory, params, tx.init(params)) for tx in (accumulating, alone)]
    by_hand, estimates = params, []
    for index in range(6):
        (_, grads), extras = agent_optax.value_and_grads(loss_fn)(params, states[0], BATCHES[index % NUM_BATCHES])
        kwargs = {"batch_index": index % NUM_BATCHES, **extras}
        updates, states[0] = accumulating.update(grads, states[0], params, **kwargs)
        params = optax.apply_updates(params, updates)
        estimate, states[1] = alone.update(grads, states[1], by_hand, **kwargs)
        estimates.append(estimate)
        if index % 2:
            by_hand = jax.tree.map(lambda p, a, b: p - 0.5 * (a + b) / 2, by_hand, *estimates)
            estimates = []
        jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6), params, by_hand)
    assert np.abs(params["kernel"] - make_params()["kernel"]).max() > 0.1
