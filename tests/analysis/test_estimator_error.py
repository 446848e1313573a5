"""The error of corrected gradients against estimates made one by one, for every memory and storage."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import agent_optax
from agent_optax import analysis

NUM_BATCHES = 6


@pytest.fixture(scope="module")
def problem():
    """`(loss_fn, params, later, batches)` of a small network and a point some steps later."""

    def loss_fn(params, batch):
        inputs, targets = batch
        return jnp.mean((jnp.tanh(inputs @ params["hidden"] + params["bias"]) @ params["out"] - targets) ** 2)

    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "bias": jnp.zeros(12),
        "hidden": jax.random.normal(keys[0], (5, 12)),
        "out": jax.random.normal(keys[1], (12, 3)),
    }
    batches = jax.random.normal(keys[2], (NUM_BATCHES, 8, 5)), jax.random.normal(keys[3], (NUM_BATCHES, 8, 3))
    return loss_fn, params, analysis.perturb(params, 0.2, 7), batches


def batch_of(batches, index):
    return jax.tree.map(lambda leaf: leaf[index], batches)


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64)


def jitted_update(tx, loss_fn):
    """A function to the raw gradient, the output of `tx` and its next state."""

    @jax.jit
    def update(params, opt_state, batch, index):
        (_, grads), extras = agent_optax.value_and_grads(loss_fn)(params, opt_state, batch)
        return grads, *tx.update(grads, opt_state, params, batch_index=index, **extras)

    return update


def one_by_one(tx, loss_fn, params, opt_state, batches) -> tuple[float, float, float]:
    """Error, variance and bias ratio of the output of `tx`, from its gradients one after another."""
    raw, estimates = [], []
    update = jitted_update(tx, loss_fn)
    for index in range(NUM_BATCHES):
        grads, estimate, _ = update(params, opt_state, batch_of(batches, index), index)
        raw.append(flat(grads))
        estimates.append(flat(estimate))
    return ratios(np.stack(raw), np.stack(estimates))


def ratios(raw: np.ndarray, estimates: np.ndarray) -> tuple[float, float, float]:
    """Of gradients [N, D]."""
    raw_variance = ((raw - raw.mean(axis=0)) ** 2).sum(axis=1).mean()
    error = ((estimates - raw.mean(axis=0)) ** 2).sum(axis=1).mean()
    variance = ((estimates - estimates.mean(axis=0)) ** 2).sum(axis=1).mean()
    bias = ((estimates.mean(axis=0) - raw.mean(axis=0)) ** 2).sum()
    return error / raw_variance, variance / raw_variance, bias / raw_variance


CORRECTIONS = {
    "SVRG": lambda: agent_optax.correct_gradients(agent_optax.snapshot(), agent_optax.constant(1.0), 1.0),
    "fixed 0.1": lambda: agent_optax.correct_gradients(agent_optax.snapshot(), agent_optax.constant(1.0), 0.1),
    "gradient regression": lambda: agent_optax.correct_gradients(
        agent_optax.snapshot(), agent_optax.gradient_regression(), 1.0
    ),
    "cached": lambda: agent_optax.correct_gradients(
        agent_optax.snapshot(NUM_BATCHES), agent_optax.gradient_regression(), 1.0
    ),
    "STORM": lambda: agent_optax.correct_gradients(agent_optax.recursion(), agent_optax.constant(0.9), 1.0),
    "SAGA": lambda: agent_optax.correct_gradients(agent_optax.table(NUM_BATCHES), agent_optax.constant(1.0), 1.0),
    "history": lambda: agent_optax.correct_gradients(agent_optax.history(), agent_optax.constant(0.5), 1.0),
}


def after_an_epoch(tx, loss_fn, params, batches):
    """The state after a refresh, if there is anything to refresh, and a step on each batch, at `params`."""
    opt_state = tx.init(params)
    if hasattr(opt_state.memory_state, "refreshed"):
        opt_state = agent_optax.refresh(loss_fn, params, opt_state, batches)
    update = jitted_update(tx, loss_fn)
    for index in range(NUM_BATCHES):
        near = jax.tree.map(lambda p, i=index: p * (1 + 0.02 * i), params)
        opt_state = update(near, opt_state, batch_of(batches, index), index)[-1]
    return opt_state


@pytest.mark.parametrize("name", CORRECTIONS)
def test_it_is_the_error_of_the_estimates(problem, name):
    loss_fn, params, later, batches = problem
    tx = CORRECTIONS[name]()
    opt_state = after_an_epoch(tx, loss_fn, params, batches)
    expected = one_by_one(tx, loss_fn, later, opt_state, batches)
    measure = jax.jit(functools.partial(analysis.estimator_error, loss_fn))
    for measured in (
        measure(later, opt_state, batches),
        analysis.estimator_error(loss_fn, later, opt_state, batches, tx=tx),
    ):
        np.testing.assert_allclose(measured[:3], expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(measured.error_ratio, measured.variance_ratio + measured.bias_ratio, rtol=1e-5)


@pytest.mark.parametrize(("c", "scaling"), [(1.0, 1.0), (0.7, 0.1), (0.0, 1.0)])
def test_a_snapshot_agrees_with_variance_ratio(problem, c, scaling):
    """And is unbiased on the batches of its refresh."""
    loss_fn, params, later, batches = problem
    tx = agent_optax.correct_gradients(agent_optax.snapshot(), agent_optax.constant(c), scaling)
    opt_state = agent_optax.refresh(loss_fn, params, tx.init(params), batches)
    error = analysis.estimator_error(loss_fn, later, opt_state, batches)
    expected = analysis.variance_ratio(loss_fn, later, params, batches, c * scaling)
    np.testing.assert_allclose(error.error_ratio, expected, rtol=1e-5)
    assert float(error.bias_ratio) < 1e-10
    raw = analysis.gradient_correlation(loss_fn, later, params, batches).variance
    np.testing.assert_allclose(error.raw_variance, raw, rtol=1e-5)


def test_a_mean_gradient_of_other_data_is_a_bias(problem):
    """w (E g_old - g_mean), as in adversarial training, where the mean gradient is that of clean data."""
    loss_fn, params, later, batches = problem
    other = jax.tree.map(lambda leaf: leaf + 0.5, batches)
    tx = agent_optax.correct_gradients(agent_optax.snapshot(), agent_optax.constant(1.0), scaling=0.8)
    opt_state = agent_optax.refresh(loss_fn, params, tx.init(params), batches)
    error = analysis.estimator_error(loss_fn, later, opt_state, other)
    means = [
        np.mean([flat(jax.grad(loss_fn)(params, batch_of(b, i))) for i in range(NUM_BATCHES)], axis=0)
        for b in (other, batches)
    ]
    squared_bias = 0.8**2 * ((means[0] - means[1]) ** 2).sum()
    np.testing.assert_allclose(error.bias_ratio * error.raw_variance, squared_bias, rtol=1e-4)
    np.testing.assert_allclose(
        error.variance_ratio, analysis.variance_ratio(loss_fn, later, params, other, 0.8), rtol=1e-4
    )


def sparse_run(problem, storage, drop_fraction=0.4):
    """Ten steps of RigL, two topology updates, one after the refresh; the state and the parameters after them."""
    loss_fn, params, _, batches = problem
    correction = agent_optax.correct_gradients(agent_optax.snapshot(), agent_optax.gradient_regression(), scaling=1.0)
    tx = agent_optax.sparsify(
        optax.chain(correction, optax.sgd(0.05, momentum=0.9)),
        agent_optax.rigl(update_every=4, drop_fraction=drop_fraction),
        sparsity=0.5,
        storage=storage,
        key=3,
    )
    opt_state = tx.init(params)
    params = agent_optax.mask_params(params, opt_state)

    @jax.jit
    def step(params, opt_state, batch):
        (_, grads), extras = agent_optax.value_and_grads(loss_fn)(params, opt_state, batch)
        updates, opt_state = tx.update(grads, opt_state, params, **extras)
        return optax.apply_updates(params, updates), opt_state

    for index in range(10):
        if index == 5:
            opt_state = agent_optax.refresh(loss_fn, params, opt_state, batches)
        params, opt_state = step(params, opt_state, batch_of(batches, index % NUM_BATCHES))
    return params, opt_state


def masked_ratios(problem, params, opt_state) -> tuple[float, float, float]:
    """From dense arrays: the snapshot, its mean gradient, the masks of now."""
    loss_fn, _, _, batches = problem
    masks = agent_optax.active_masks(opt_state, params)
    snapshot = agent_optax.snapshot_params(opt_state, params)
    weight = agent_optax.diagnostics(opt_state)["correction_weight"]

    def active(grads):
        return flat(jax.tree.map(lambda m, g: g if m is None else g * m, masks, grads, is_leaf=lambda x: x is None))

    new, old = (
        np.stack([active(jax.grad(loss_fn)(point, batch_of(batches, i))) for i in range(NUM_BATCHES)])
        for point in (params, snapshot)
    )
    return ratios(new, new - float(weight) * (old - old.mean(axis=0)))


@pytest.mark.parametrize("storage", ["dense", "compact"])
def test_inactive_weights_take_no_part(problem, storage):
    """Nothing grows after the refresh: the corrected gradient is that of the active weights."""
    params, opt_state = sparse_run(problem, storage, drop_fraction=0.0)
    measured = analysis.estimator_error(problem[0], params, opt_state, problem[3])
    np.testing.assert_allclose(measured[:3], masked_ratios(problem, params, opt_state), rtol=1e-3, atol=1e-6)


def test_storages_agree_until_weights_grow(problem):
    runs = [sparse_run(problem, storage, drop_fraction=0.0) for storage in ("dense", "compact")]
    dense, compact = (analysis.estimator_error(problem[0], *run, problem[3]) for run in runs)
    np.testing.assert_allclose(dense, compact, rtol=1e-3, atol=1e-6)
    correlations = [
        analysis.gradient_correlation(
            problem[0],
            params,
            agent_optax.snapshot_params(opt_state, params),
            problem[3],
            masks=agent_optax.active_masks(opt_state, params),
        )
        for params, opt_state in runs
    ]
    for a, b in zip(jax.tree.leaves(correlations[0]), jax.tree.leaves(correlations[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3)


def test_what_grew_is_corrected_as_the_storage_does(problem):
    """Dense storage corrects grown weights with the dense mean gradient; compact storage waits for the refresh."""
    loss_fn, _, _, batches = problem
    params, opt_state = sparse_run(problem, "dense")
    masks = agent_optax.active_masks(opt_state, params)
    snapshot = agent_optax.snapshot_params(opt_state, params)
    has_grown = {k: m & (snapshot[k] == 0) for k, m in masks.items() if m is not None}
    assert sum(int(m.sum()) for m in has_grown.values()) > 0
    dense = analysis.estimator_error(loss_fn, params, opt_state, batches)
    np.testing.assert_allclose(dense[:3], masked_ratios(problem, params, opt_state), rtol=1e-3, atol=1e-6)

    params, opt_state = sparse_run(problem, "compact")
    compact = analysis.estimator_error(loss_fn, params, opt_state, batches)
    assert float(compact.bias_ratio) < 1e-6  # an old gradient without its mean would be a bias
    is_uncorrected = jax.tree.leaves(opt_state.active_weights.is_uncorrected)
    assert sum(int(new.sum()) for new in is_uncorrected) > 0
    assert float(compact.variance_ratio) > float(dense.variance_ratio)


WRAPPERS = {
    "masked": lambda tx: optax.masked(tx, {"bias": False, "hidden": True, "out": False}),
    "partition": lambda tx: optax.partition(
        {"corrected": tx, "plain": optax.sgd(0.1)}, {"bias": "plain", "hidden": "corrected", "out": "plain"}
    ),
    "sparse": lambda tx: agent_optax.sparsify(WRAPPERS["masked"](tx), agent_optax.static(), sparsity=0.5),
    "sparse inside": lambda tx: WRAPPERS["partition"](
        agent_optax.sparsify(tx, agent_optax.rigl(), sparsity=0.5, storage="compact")
    ),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_hidden_parameters_do_not_count(problem, name):
    """Of an optimizer that corrects only some leaves, only those are measured."""
    loss_fn, params, later, batches = problem
    correction = agent_optax.correct_gradients(agent_optax.snapshot(), agent_optax.constant(1.0), scaling=1.0)
    tx = WRAPPERS[name](correction)
    opt_state = tx.init(params)
    masks = agent_optax.active_masks(opt_state, params) if "sparse" in name else None
    if masks is not None:
        params, later = (agent_optax.mask_params(point, opt_state) for point in (params, later))
    opt_state = agent_optax.refresh(loss_fn, params, opt_state, batches)
    error = analysis.estimator_error(loss_fn, later, opt_state, batches)
    moments = analysis.gradient_correlation(loss_fn, later, {**later, "hidden": params["hidden"]}, batches, masks=masks)
    np.testing.assert_allclose(error.raw_variance, moments.leaf_variance["hidden"], rtol=1e-5)
    expected = 1 - (2 * moments.leaf_covariance["hidden"] - moments.leaf_old_variance["hidden"]) / error.raw_variance
    np.testing.assert_allclose(error.variance_ratio, expected, rtol=1e-4)
    assert float(error.bias_ratio) > 0  # the other leaves have moved since the mean gradient was taken


def test_any_estimate_can_be_measured(problem):
    loss_fn, _, later, batches = problem
    tx = optax.scale(0.5)
    error = analysis.estimator_error(loss_fn, later, tx.init(later), batches, tx=tx)
    full = flat(analysis_mean(loss_fn, later, batches))
    np.testing.assert_allclose(error.variance_ratio, 0.25, rtol=1e-5)
    np.testing.assert_allclose(error.bias_ratio * error.raw_variance, 0.25 * (full**2).sum(), rtol=1e-4)


def analysis_mean(loss_fn, params, batches):
    return jax.grad(lambda p: jnp.mean(jax.vmap(loss_fn, (None, 0))(p, batches)))(params)


def test_auxiliary_output_is_dropped(problem):
    loss_fn, params, later, batches = problem
    tx = CORRECTIONS["SVRG"]()
    opt_state = agent_optax.refresh(loss_fn, params, tx.init(params), batches)
    plain = analysis.estimator_error(loss_fn, later, opt_state, batches)
    aux = analysis.estimator_error(lambda p, b: (loss_fn(p, b), b), later, opt_state, batches, has_aux=True)
    np.testing.assert_allclose(plain, aux, rtol=1e-6)
