"""The recursion memory and STORM: the estimate by hand, where it begins anew, and what it asks for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import jit

import agent_optax

NUM_STEPS = 6


def loss_fn(params, batch):
    return jnp.mean(jnp.log(jnp.cosh(batch @ params["kernel"] + params["bias"])))


grad_fn = jit(jax.grad(loss_fn))
grads_fn = agent_optax.value_and_grads(loss_fn)


def make_params(dtype=np.float32):
    rng = np.random.default_rng(0)
    return {"kernel": jnp.asarray(rng.normal(size=(4, 3)), dtype), "bias": jnp.asarray(rng.normal(size=3), dtype)}


def make_batches(dtype=np.float32):
    return jnp.asarray(np.random.default_rng(1).normal(size=(NUM_STEPS, 8, 4)), dtype)


def correction(coefficient, scaling=1.0):
    return agent_optax.correct_gradients(agent_optax.recursion(), coefficient, scaling)


def assert_trees_close(actual, expected, rtol=1e-12, atol=1e-14):
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=rtol, atol=atol), actual, expected)


def train(tx, params, batches):
    """Parameters and state after each step."""
    opt_state = tx.init(params)

    @jit
    def step(params, opt_state, batch):
        (_, grads), extras = grads_fn(params, opt_state, batch)
        updates, opt_state = tx.update(grads, opt_state, params, **extras)
        return optax.apply_updates(params, updates), opt_state

    history = []
    for batch in batches:
        params, opt_state = step(params, opt_state, batch)
        history.append((params, opt_state))
    return history


def train_by_hand(weight_at, params, batches, learning_rate):
    """Cutkosky & Orabona, Algorithm 1, with given weights and a constant rate."""
    previous = estimate = None
    history = []
    for t, batch in enumerate(batches):
        grads = grad_fn(params, batch)
        if estimate is not None:
            old = grad_fn(previous, batch)
            weight = weight_at(t)
            grads = jax.tree.map(lambda g, d, o: g + weight * (d - o), grads, estimate, old)  # noqa: B023
        previous, estimate = params, grads
        params = jax.tree.map(lambda p, d: p - learning_rate * d, params, estimate)
        history.append(params)
    return history


@pytest.mark.parametrize("weight", [0.0, 0.6, 1.0])
def test_estimate_by_hand(x64, weight):
    params, batches = make_params(np.float64), make_batches(np.float64)
    tx = optax.chain(correction(agent_optax.constant(2 * weight), scaling=0.5), optax.sgd(0.3))
    by_hand = train_by_hand(lambda t: weight, params, batches, 0.3)
    for (actual, _), expected in zip(train(tx, params, batches), by_hand, strict=True):
        assert_trees_close(actual, expected)


@pytest.mark.parametrize("a", [0.25, lambda step: 1 / (1 + jnp.asarray(step, jnp.float64))])
def test_storm_keeps_one_minus_a(x64, a):
    params, batches = make_params(np.float64), make_batches(np.float64)
    weight_at = lambda t: 1 - (a(t) if callable(a) else a)  # noqa: E731
    by_hand = train_by_hand(weight_at, params, batches, 0.3)
    for (actual, _), expected in zip(train(agent_optax.storm(0.3, a), params, batches), by_hand, strict=True):
        assert_trees_close(actual, expected)


def test_storm_with_a_of_one_is_sgd():
    params, batches = make_params(), make_batches()
    actual, _ = train(agent_optax.storm(0.3, a=1.0), params, batches)[-1]
    expected, _ = train(optax.sgd(0.3), params, batches)[-1]
    assert_trees_close(actual, expected, rtol=1e-6, atol=1e-7)


def test_old_gradient_is_that_of_this_batch_at_the_previous_parameters():
    params, batches = make_params(), make_batches()
    history = train(agent_optax.storm(0.3), params, batches)
    (before, _), (now, opt_state) = history[-2:]
    (value, _), extras = grads_fn(now, opt_state, batches[0])
    assert sorted(extras) == ["old_grads", "old_value", "value"]
    assert_trees_close(extras["old_grads"], grad_fn(before, batches[0]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(extras["old_value"], loss_fn(before, batches[0]), rtol=1e-6)
    assert abs(float(extras["old_value"] - value)) > 1e-4  # the two points differ


def test_loss_regression_is_fed_step_by_step(x64):
    """The coefficient is the regression over the pairs of all steps, geometrically weighted."""
    decay, params, batches = 0.7, make_params(np.float64), make_batches(np.float64)
    tx = optax.chain(correction(agent_optax.loss_regression(decay=decay, clip=False)), optax.sgd(0.5))
    history = train(tx, params, batches)
    points = [params, *(p for p, _ in history)]
    pairs = np.array(
        [[loss_fn(points[t], batches[t]), loss_fn(points[t - 1], batches[t])] for t in range(1, NUM_STEPS)]
    )
    weights = decay ** np.arange(len(pairs))[::-1]
    covariance = np.cov(pairs.T, aweights=weights)
    correlation = agent_optax.diagnostics(history[-1][1])["correlation"]
    np.testing.assert_allclose(correlation, covariance[0, 1] / covariance[1, 1], rtol=1e-10)
    assert abs(correlation - 1) > 1e-3


def test_gradient_regression_is_fed_step_by_step(x64):
    decay, params, batches = 0.7, make_params(np.float64), make_batches(np.float64)
    tx = optax.chain(correction(agent_optax.gradient_regression(decay=decay, clip=False)), optax.sgd(0.5))
    history = train(tx, params, batches)
    points, states = [params, *(p for p, _ in history)], [None, *(s for _, s in history)]
    products = []
    flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])  # noqa: E731
    for t in range(1, NUM_STEPS):
        mean = flat(optax.tree.get(states[t], "previous_estimate"))
        new, old = (flat(grad_fn(points[s], batches[t])) - mean for s in (t, t - 1))
        products.append([new @ old, old @ old])
    averaged = decay ** np.arange(len(products))[::-1] @ np.array(products)
    correlation = agent_optax.diagnostics(history[-1][1])["correlation"]
    np.testing.assert_allclose(correlation, averaged[0] / averaged[1], rtol=1e-10)


def test_entries_that_are_not_finite_begin_anew():
    tx = correction(agent_optax.constant(0.5))
    params = jnp.zeros(2)
    opt_state = tx.init(params)
    steps = [  # gradient, old gradient, estimate by hand
        ([4.0, 4.0], [4.0, 4.0], [4.0, 4.0]),
        ([6.0, np.nan], [8.0, 8.0], [6 - 0.5 * (8 - 4), np.nan]),
        ([1.0, 3.0], [2.0, 2.0], [1 - 0.5 * (2 - 4), 3.0]),
        ([1.0, 1.0], [2.0, 2.0], [1 - 0.5 * (2 - 2), 1 - 0.5 * (2 - 3)]),
    ]
    for grads, old_grads, expected in steps:
        estimate, opt_state = tx.update(jnp.asarray(grads), opt_state, params, old_grads=jnp.asarray(old_grads))
        np.testing.assert_array_equal(estimate, expected)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(opt_state))


def test_parameters_that_are_not_finite_are_not_remembered():
    tx = correction(agent_optax.constant(0.5))
    params, grads = jnp.ones(2), jnp.ones(2)
    _, opt_state = tx.update(grads, tx.init(params), params.at[0].set(jnp.inf), old_grads=grads)
    np.testing.assert_array_equal(opt_state.memory_state.previous_params, params)


@pytest.mark.parametrize("storage", ["dense", "compact"])
def test_grown_weights_begin_anew(storage):
    """In the step after its growth a weight moves by its raw gradient; the survivors go on with their estimates."""
    params, batches = make_params(), make_batches()
    tx = agent_optax.sparsify(agent_optax.storm(0.3, a=0.4), agent_optax.rigl(2, 0.5), sparsity=0.5, storage=storage)
    opt_state = tx.init(params)
    params = agent_optax.mask_params(params, opt_state)
    update = jit(tx.update)
    estimate, masks, num_grown = None, agent_optax.active_masks(opt_state, params), 0
    old_masks, previous = masks, params
    for batch in batches[:5]:
        (_, grads), extras = grads_fn(params, opt_state, batch)
        if estimate is not None:
            grown = masks["kernel"] & ~old_masks["kernel"]
            num_grown += int(grown.sum())
            old = grad_fn(previous, batch) if storage == "dense" else extras["old_grads"]
            corrected = jax.tree.map(lambda g, d, o: g + 0.6 * (d - o), grads, estimate, old)
            corrected["kernel"] = jnp.where(grown, grads["kernel"], corrected["kernel"])
        else:
            corrected = grads
        estimate, previous = corrected, params
        updates, opt_state = update(grads, opt_state, params, **extras)
        old_masks, masks = masks, agent_optax.active_masks(opt_state, params)
        by_hand = jax.tree.map(lambda p, d: p - 0.3 * d, params, corrected)
        params = optax.apply_updates(params, updates)
        survives = masks["kernel"] & old_masks["kernel"]
        np.testing.assert_allclose(params["bias"], by_hand["bias"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(params["kernel"], jnp.where(survives, by_hand["kernel"], 0), rtol=1e-5, atol=1e-6)
    assert num_grown >= 2


def test_arrays_of_its_own_survive_the_donation_of_params():
    params, tx = make_params(), agent_optax.storm(0.3)
    opt_state = tx.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, batch):
        (_, grads), extras = grads_fn(params, opt_state, batch)
        updates, opt_state = tx.update(grads, opt_state, params, **extras)
        return optax.apply_updates(params, updates), opt_state

    kept = jax.tree.map(np.array, params)
    params, opt_state = step(params, opt_state, make_batches()[0])
    assert_trees_close(optax.tree.get(opt_state, "previous_params"), kept, rtol=0, atol=0)
    step(params, opt_state, make_batches()[1])


def test_errors_name_what_is_missing():
    tx, params = correction(agent_optax.constant(0.5)), make_params()
    opt_state = tx.init(params)
    with pytest.raises(ValueError, match=r"recursion\(\)\) needs the extra argument old_grads=.*value_and_grads"):
        tx.update(params, opt_state, params)
    with pytest.raises(ValueError, match=r"remembers the parameters.*tx\.update\(grads, opt_state, params"):
        tx.update(params, opt_state, old_grads=params)
    for wrong in ({"kernel": params["kernel"]}, {**params, "bias": jnp.zeros(4)}, [1.0]):
        with pytest.raises(ValueError, match=r"old_grads= must be a tree like the gradient"):
            tx.update(params, opt_state, params, old_grads=wrong)
    tx = correction(agent_optax.loss_regression())
    opt_state = tx.init(params)
    with pytest.raises(ValueError, match=r"loss_regression\(\)\) needs the extra argument old_value="):
        tx.update(params, opt_state, params, old_grads=params, value=jnp.ones(()))
    with pytest.raises(ValueError, match=r"a must lie in \[0, 1\], got 1\.5"):
        agent_optax.storm(0.1, a=1.5)


def test_two_memories_cannot_share_one_old_gradient():
    tx = optax.chain(correction(agent_optax.constant(0.5)), agent_optax.svrg(0.1))
    params = make_params()
    with pytest.raises(ValueError, match=r"two corrections.*one old gradient.*optax\.partition"):
        grads_fn(params, tx.init(params), make_batches()[0])


def test_a_partition_may_mix_memories():
    tx = optax.partition(
        {"kernel": agent_optax.storm(0.3), "bias": agent_optax.svrg(0.3)}, {"kernel": "kernel", "bias": "bias"}
    )
    params, batches = make_params(), make_batches()
    opt_state = agent_optax.refresh(loss_fn, params, tx.init(params), batches)
    for batch in batches[:2]:
        (_, grads), extras = grads_fn(params, opt_state, batch)
        updates, opt_state = tx.update(grads, opt_state, params, **extras)
        before, params = params, optax.apply_updates(params, updates)
    (_, _), extras = grads_fn(params, opt_state, batches[3])
    point = {"kernel": before["kernel"], "bias": make_params()["bias"]}  # one step ago; at the snapshot
    assert_trees_close(extras["old_grads"], grad_fn(point, batches[3]), rtol=1e-5, atol=1e-6)
    assert_trees_close(agent_optax.snapshot_params(opt_state, params), {**params, "bias": point["bias"]})
