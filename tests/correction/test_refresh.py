"""The refresh pass: what it measures, what it leaves alone, and where in an optimizer it finds its snapshot."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import jit

import agent_optax

NUM_BATCHES, BATCH_SIZE = 5, 4


def loss_fn(params, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["kernel"] + params["bias"]) - y) ** 2)


value_by_hand, grad_by_hand = jit(loss_fn), jit(jax.grad(loss_fn))


def make_params(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in (("kernel", (3, 2)), ("bias", (2,)))}


def make_batches(dtype=np.float32):
    rng = np.random.default_rng(7)
    return tuple(jnp.asarray(rng.normal(size=(NUM_BATCHES, BATCH_SIZE, width)), dtype) for width in (3, 2))


def batch_list(batches):
    leaves, treedef = jax.tree.flatten(batches)
    return [treedef.unflatten(batch) for batch in zip(*leaves, strict=True)]


def mean_grads_by_hand(params, batches):
    grads = [grad_by_hand(params, batch) for batch in batch_list(batches)]
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *grads)


def slope_by_hand(params, old_params, batches):
    """Equation (4)."""
    losses, old_losses = ([value_by_hand(p, batch) for batch in batch_list(batches)] for p in (params, old_params))
    covariance = np.cov(losses, old_losses)
    return covariance[0, 1] / covariance[1, 1]


def correlation(opt_state):
    return agent_optax.diagnostics(opt_state)["correlation"]


def assert_trees_close(actual, expected, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=rtol, atol=atol), actual, expected)


def assert_trees_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


WAYS = {
    "scanned": lambda batches: batches,
    "numpy": lambda batches: jax.tree.map(np.asarray, batches),
    "iterator": lambda batches: iter(batch_list(batches)),
    "loader": lambda batches: (batch for batch in batch_list(jax.tree.map(np.asarray, batches))),
}


@pytest.mark.parametrize("way", WAYS)
def test_agrees_with_the_equations(x64, way):
    """Scanned on the device or looped over on the host: the coefficient first, then the snapshot moves."""
    tx = agent_optax.correct_gradients(coefficient=agent_optax.loss_regression(smoothing=0.3, clip=False))
    first, second, batches = make_params(1, np.float64), make_params(2, np.float64), make_batches(np.float64)
    opt_state = agent_optax.refresh(loss_fn, first, tx.init(make_params(0, np.float64)), WAYS[way](batches))
    assert_trees_equal(agent_optax.snapshot_params(opt_state, second), first)
    assert_trees_close(optax.tree.get(opt_state, "mean_grads"), mean_grads_by_hand(first, batches), rtol=1e-12)
    assert correlation(opt_state) == 0  # nothing to compare with yet

    opt_state = agent_optax.refresh(loss_fn, second, opt_state, WAYS[way](batches))
    assert_trees_equal(agent_optax.snapshot_params(opt_state, first), second)
    assert_trees_close(optax.tree.get(opt_state, "mean_grads"), mean_grads_by_hand(second, batches), rtol=1e-12)
    np.testing.assert_allclose(correlation(opt_state), 0.3 * slope_by_hand(second, first, batches), rtol=1e-12)


@pytest.mark.parametrize("way", ["scanned", "iterator"])
def test_sub_sample(way):
    """Fewer batches than the data set has: means and estimate are over those alone."""
    tx = agent_optax.correct_gradients(coefficient=agent_optax.loss_regression(smoothing=1.0, clip=False))
    first, second, batches = make_params(1), make_params(2), make_batches()
    sample = jax.tree.map(lambda x: x[1:4], batches)
    opt_state = agent_optax.refresh(loss_fn, first, tx.init(first), WAYS[way](batches))
    opt_state = agent_optax.refresh(loss_fn, second, opt_state, WAYS[way](sample))
    mean_grads = optax.tree.get(opt_state, "mean_grads")
    assert_trees_close(mean_grads, mean_grads_by_hand(second, sample))
    np.testing.assert_allclose(correlation(opt_state), slope_by_hand(second, first, sample), rtol=1e-3)
    assert np.abs(mean_grads["bias"] - mean_grads_by_hand(second, batches)["bias"]).max() > 1e-2


def test_equal_batches_make_the_mean_over_samples():
    """The mean over batches is that over all samples."""
    tx = agent_optax.correct_gradients()
    params, batches = make_params(1), make_batches()
    opt_state = agent_optax.refresh(loss_fn, params, tx.init(params), batches)
    whole = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batches)
    assert_trees_close(optax.tree.get(opt_state, "mean_grads"), grad_by_hand(params, whole))


def train_epoch(tx, params, opt_state, batches):
    opt_state = agent_optax.refresh(loss_fn, params, opt_state, batches)

    def step(carry, batch):
        params, opt_state = carry
        (_, grads), extras = agent_optax.value_and_grads(loss_fn)(params, opt_state, batch)
        updates, opt_state = tx.update(grads, opt_state, params, **extras)
        return (optax.apply_updates(params, updates), opt_state), None

    return jax.lax.scan(step, (params, opt_state), batches)[0]


def test_inside_jit_and_scan():
    """Epochs with their refresh in one compiled program give the run that is called from Python."""
    tx = agent_optax.agent(0.1, scaling=1.0)
    batches = make_batches()
    start = make_params(1), tx.init(make_params(1))

    @jit
    def train(params, opt_state):
        epoch = lambda carry, _: (train_epoch(tx, *carry, batches), None)  # noqa: E731
        return jax.lax.scan(epoch, (params, opt_state), length=3)[0]

    compiled, looped = train(*start), start
    for _ in range(3):
        looped = train_epoch(tx, *looped, batches)
    assert correlation(looped[1]) > 0.1
    assert_trees_close(compiled, looped, rtol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_compiles_once(way):
    """The loss is traced in the first pass only, whatever training does to parameters and state in between."""
    num_traces = 0

    def counted_loss(params, batch):
        nonlocal num_traces
        num_traces += 1
        return loss_fn(params, batch)

    tx = agent_optax.agent(0.1)
    params = make_params(1)
    opt_state = tx.init(params)
    batches = make_batches()

    @jit
    def step(params, opt_state, batch):
        (_, grads), extras = agent_optax.value_and_grads(loss_fn)(params, opt_state, batch)
        updates, opt_state = tx.update(grads, opt_state, params, **extras)
        return optax.apply_updates(params, updates), opt_state

    traces = []
    for _ in range(3):
        opt_state = agent_optax.refresh(counted_loss, params, opt_state, WAYS[way](batches))
        traces.append(num_traces)
        params, opt_state = step(params, opt_state, batch_list(batches)[0])
    assert traces[0] > 0 and traces == [traces[0]] * 3


@pytest.mark.parametrize("way", ["scanned", "iterator"])
def test_keeps_the_types_of_the_state(way):
    """The state may be carried by `lax.cond` and `lax.scan`: structure, shapes, dtypes, weak types stay."""
    tx = agent_optax.agent(0.1)
    params, batches = make_params(1), make_batches()
    opt_state = tx.init(params)
    refreshed = agent_optax.refresh(loss_fn, params, opt_state, WAYS[way](batches))
    assert jax.tree.structure(refreshed) == jax.tree.structure(opt_state)
    assert jax.tree.map(jax.typeof, refreshed) == jax.tree.map(jax.typeof, opt_state)


def test_old_losses_are_evaluated_only_for_a_coefficient_that_regresses_them():
    points = []

    def recorded_loss(params, batch):
        jax.debug.callback(lambda bias: points.append(bias.tolist()), params["bias"])
        return loss_fn(params, batch)

    def biases(coefficient):
        points.clear()
        tx = agent_optax.correct_gradients(coefficient=coefficient)
        opt_state = tx.init(make_params(1))
        jax.block_until_ready(agent_optax.refresh(recorded_loss, make_params(2), opt_state, make_batches()))
        jax.effects_barrier()
        return {tuple(point) for point in points}

    here, there = (tuple(make_params(seed)["bias"].tolist()) for seed in (2, 1))
    assert biases(agent_optax.loss_regression()) == {here, there}
    assert biases(agent_optax.gradient_regression()) == biases(agent_optax.constant(1.0)) == {here}


# Auxiliary output.


def normalised_loss(params, batch_and_statistics):
    """Batch normalisation in training mode: the second output is the new running statistics."""
    (x, y), running = batch_and_statistics
    x = x @ params["kernel"]
    mean, var = x.mean(0), x.var(0)
    loss = jnp.mean(((x - mean) / jnp.sqrt(var + 1e-5) + params["bias"] - y) ** 2)
    return loss, {"mean": 0.9 * running["mean"] + 0.1 * mean, "var": 0.9 * running["var"] + 0.1 * var}


@pytest.mark.parametrize("way", ["scanned", "iterator"])
def test_running_statistics_are_those_of_training_alone(way):
    """With a correction of weight 0 a run with refreshes is the run without, running statistics included."""
    batches = make_batches()
    running = {"mean": jnp.zeros(2), "var": jnp.ones(2)}

    def train(tx, refreshes):
        params, opt_state, statistics = make_params(1), tx.init(make_params(1)), running
        grads_fn = agent_optax.value_and_grads(normalised_loss, has_aux=True)

        @jit
        def step(params, opt_state, statistics, batch):
            ((_, statistics), grads), extras = grads_fn(params, opt_state, (batch, statistics))
            updates, opt_state = tx.update(grads, opt_state, params, **extras)
            return optax.apply_updates(params, updates), opt_state, statistics

        for _ in range(2):
            if refreshes:
                repeated = jax.tree.map(lambda x: jnp.stack([x] * NUM_BATCHES), statistics)
                opt_state = agent_optax.refresh(
                    normalised_loss, params, opt_state, WAYS[way]((batches, repeated)), has_aux=True
                )
            for batch in batch_list(batches):
                params, opt_state, statistics = step(params, opt_state, statistics, batch)
        return params, statistics, opt_state

    params, statistics, opt_state = train(agent_optax.agent(0.1, scaling=0.0), refreshes=True)
    plain = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9, nesterov=True))
    plain_params, plain_statistics, _ = train(plain, refreshes=False)
    assert_trees_close((params, statistics), (plain_params, plain_statistics), rtol=1e-6)
    assert np.abs(statistics["mean"]).max() > 0.1
    assert optax.tree.get(opt_state, "num_refreshes") and not np.any(np.isnan(correlation(opt_state)))


def test_auxiliary_output_never_reaches_the_state():
    """Not even where it is not finite."""
    tx, params, batches = agent_optax.agent(0.1), make_params(1), make_batches()

    def with_aux(params, batch):
        return loss_fn(params, batch), {"anything": jnp.full((2, 2), jnp.nan), "label": batch[1].astype(jnp.int32)}

    states = []
    for fn, has_aux in ((loss_fn, False), (with_aux, True)):
        opt_state = agent_optax.refresh(fn, params, tx.init(params), batches, has_aux=has_aux)
        states.append(agent_optax.refresh(fn, make_params(2), opt_state, batches, has_aux=has_aux))
    assert_trees_close(*states)


# Numbers that are not finite.


@pytest.mark.parametrize("way", ["scanned", "iterator"])
@pytest.mark.parametrize("coefficient", [agent_optax.loss_regression, agent_optax.gradient_regression])
def test_not_finite_gradient_leaves_the_state_alone(coefficient, way):
    tx = agent_optax.correct_gradients(coefficient=coefficient(), scaling=1.0)
    first, second, batches = make_params(1), make_params(2), make_batches()
    spoilt = (batches[0].at[3, 1, 2].set(jnp.nan), batches[1])

    opt_state = agent_optax.refresh(loss_fn, second, tx.init(first), WAYS[way](spoilt))
    assert_trees_equal(opt_state, tx.init(first))
    (_, grads), extras = agent_optax.value_and_grads(loss_fn)(first, opt_state, batch_list(batches)[0])
    corrected, _ = tx.update(grads, opt_state, first, **extras)
    assert_trees_equal(corrected, grads)  # there is still no mean gradient to correct with

    good = agent_optax.refresh(loss_fn, first, opt_state, WAYS[way](batches))
    (_, grads), extras = agent_optax.value_and_grads(loss_fn)(second, good, batch_list(batches)[0])
    _, good = tx.update(grads, good, second, **extras)  # gradient regression has measured something
    assert_trees_equal(agent_optax.refresh(loss_fn, second, good, WAYS[way](spoilt)), good)

    moved = agent_optax.refresh(loss_fn, second, good, WAYS[way](batches))
    assert_trees_equal(agent_optax.snapshot_params(moved, first), second)


# Wrappers of Optax around the correction.

LEARNING_RATE, WEIGHT = 0.1, 0.5


def correction():
    return agent_optax.correct_gradients(coefficient=agent_optax.constant(WEIGHT), scaling=1.0)


def corrected_sgd(learning_rate=LEARNING_RATE):
    return optax.chain(correction(), optax.sgd(learning_rate))


PLACES = {"kernel": "first", "bias": "second"}

WRAPPERS = {  # the optimizer, and the parameters whose gradients it corrects
    "chain": (lambda: optax.chain(optax.identity(), optax.chain(correction()), optax.sgd(LEARNING_RATE)), PLACES),
    "inject_hyperparams": (lambda: optax.inject_hyperparams(corrected_sgd)(learning_rate=LEARNING_RATE), PLACES),
    "MultiSteps": (lambda: optax.chain(correction(), optax.MultiSteps(optax.sgd(LEARNING_RATE), 1)), PLACES),
    "masked": (
        lambda: optax.chain(optax.masked(correction(), {"kernel": True, "bias": False}), optax.sgd(LEARNING_RATE)),
        ["kernel"],
    ),
    "partition": (
        lambda: optax.partition({"first": optax.sgd(LEARNING_RATE), "second": corrected_sgd()}, PLACES),
        ["bias"],
    ),
    "two of partition": (
        lambda: optax.partition({"first": corrected_sgd(), "second": corrected_sgd()}, PLACES),
        PLACES,
    ),
    "conditionally_transform": (
        lambda: optax.chain(
            optax.conditionally_transform(correction(), lambda step, **_: step >= 0, forward_extra_args=True),
            optax.sgd(LEARNING_RATE),
        ),
        PLACES,
    ),
    "sparsify": (
        lambda: agent_optax.sparsify(
            corrected_sgd(), agent_optax.static(), masks={"kernel": np.ones((3, 2), bool), "bias": None}
        ),
        PLACES,
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_finds_the_snapshot_inside(wrapper):
    make, corrected = WRAPPERS[wrapper]
    tx = make()
    first, second, batches = make_params(1), make_params(2), make_batches()
    opt_state = agent_optax.refresh(loss_fn, first, tx.init(make_params(0)), batches)
    point = agent_optax.snapshot_params(opt_state, second)
    assert_trees_equal(point, {name: (first if name in corrected else second)[name] for name in second})

    batch = batch_list(batches)[0]
    (_, grads), extras = agent_optax.value_and_grads(loss_fn)(second, opt_state, batch)
    updates, _ = jit(tx.update)(grads, opt_state, second, **extras)
    old_grads, mean_grads = grad_by_hand(point, batch), mean_grads_by_hand(first, batches)
    for name in second:
        weight = WEIGHT if name in corrected else 0
        by_hand = grads[name] - weight * (old_grads[name] - mean_grads[name])
        np.testing.assert_allclose(updates[name], -LEARNING_RATE * by_hand, rtol=1e-5, atol=1e-6)


def test_between_micro_batches():
    """Gradient accumulation behind the correction: a refresh in its middle keeps what has been accumulated."""
    tx = optax.chain(correction(), optax.MultiSteps(optax.sgd(LEARNING_RATE), 2))
    params, batches = make_params(1), make_batches()
    opt_state = agent_optax.refresh(loss_fn, make_params(2), tx.init(params), batches)
    estimates = []
    for index, point in enumerate((make_params(2), make_params(3))):
        batch = batch_list(batches)[index]
        (_, grads), extras = agent_optax.value_and_grads(loss_fn)(params, opt_state, batch)
        updates, opt_state = tx.update(grads, opt_state, params, **extras)
        mean_grads, old_grads = mean_grads_by_hand(point, batches), grad_by_hand(point, batch)
        estimates.append(jax.tree.map(lambda g, old, mean: g - WEIGHT * (old - mean), grads, old_grads, mean_grads))
        if index == 0:
            assert not any(np.any(u) for u in jax.tree.leaves(updates))
            opt_state = agent_optax.refresh(loss_fn, make_params(3), opt_state, batches)
    assert_trees_close(updates, jax.tree.map(lambda a, b: -LEARNING_RATE * (a + b) / 2, *estimates))


# Half precision.


@pytest.mark.parametrize("way", ["scanned", "loader"])
def test_half_precision_gradients_are_summed_in_single(way):
    """A sum of ones in bfloat16 stops at 256: the mean over 512 batches would be a half."""
    num_batches = 512
    tx = agent_optax.correct_gradients(coefficient=agent_optax.constant(1.0))
    params = jnp.zeros(2, jnp.bfloat16)
    ones = jnp.ones((num_batches, 2), jnp.bfloat16)
    opt_state = agent_optax.refresh(lambda p, batch: jnp.sum(p * batch), params, tx.init(params), WAYS[way](ones))
    mean_grads = optax.tree.get(opt_state, "mean_grads")
    assert mean_grads.dtype == jnp.bfloat16
    np.testing.assert_array_equal(mean_grads.astype(jnp.float32), 1)


@pytest.mark.parametrize("way", ["scanned", "iterator"])
def test_half_precision_parameters_have_single_precision_statistics(way):
    """Losses near 100 that differ in the second decimal: bfloat16 knows only every half there."""
    rng = np.random.default_rng(0)
    old_losses = 100 + 0.05 * rng.normal(size=16)
    losses = 100 + 0.6 * (old_losses - 100) + 0.01 * rng.normal(size=16)
    pairs = np.stack([losses, old_losses], axis=1).astype(np.float32)

    def given_loss(place, pair):
        return (1 - place[0]) * pair[0] + place[0] * pair[1]

    tx = agent_optax.correct_gradients(coefficient=agent_optax.loss_regression(smoothing=1.0))
    here, there = jnp.zeros(1, jnp.bfloat16), jnp.ones(1, jnp.bfloat16)
    opt_state = agent_optax.refresh(given_loss, there, tx.init(there), WAYS[way](pairs))
    opt_state = agent_optax.refresh(given_loss, here, opt_state, WAYS[way](pairs))
    covariance = np.cov(*pairs.astype(np.float64).T)
    assert correlation(opt_state).dtype == jnp.float32
    # The mean of float32 losses near 100 is good to about 1e-5, which is 2e-4 of their deviations.
    np.testing.assert_allclose(correlation(opt_state), covariance[0, 1] / covariance[1, 1], rtol=1e-3)
    assert agent_optax.snapshot_params(opt_state, here).dtype == jnp.bfloat16


@pytest.mark.parametrize("as_batches", [lambda batches: batches, lambda batches: iter(batch_list(batches))])
def test_further_arguments_reach_the_loss_and_do_not_compile_anew(as_batches):
    params, batches, num_traced = make_params(1), make_batches(), 0

    def shifted(params, batch, shift, scale):
        nonlocal num_traced
        num_traced += 1
        return scale * loss_fn({**params, "bias": params["bias"] + shift}, batch)

    opt_state, counts = agent_optax.agent(0.1).init(params), []
    for shift in (0.5, 2.0):
        args = (jnp.full(2, shift), jnp.asarray(3.0))
        refreshed = agent_optax.refresh(shifted, params, opt_state, as_batches(batches), args=args)
        expected = mean_grads_by_hand({**params, "bias": params["bias"] + shift}, batches)
        mean_grads = optax.tree_utils.tree_get(refreshed, "mean_grads")
        assert_trees_close(mean_grads, jax.tree.map(lambda g: 3 * g, expected))
        counts.append(num_traced)
    assert counts[0] == counts[1]


# Mistakes.


def test_needs_a_snapshot():
    params, batches = make_params(1), make_batches()
    with pytest.raises(ValueError, match=r"no correct_gradients at all.*snapshot\(\)"):
        agent_optax.refresh(loss_fn, params, optax.sgd(0.1).init(params), batches)
    with pytest.raises(ValueError, match=r"only HistoryState.*leave the call to refresh out"):
        history = agent_optax.correct_gradients(memory=agent_optax.history())
        agent_optax.refresh(loss_fn, params, history.init(params), batches)
    with pytest.raises(ValueError, match="holds no snapshot"):
        agent_optax.snapshot_params(optax.sgd(0.1).init(params), params)


def test_needs_batches_of_equal_size():
    params = make_params(1)
    opt_state = agent_optax.agent(0.1).init(params)
    x, y = make_batches()
    with pytest.raises(ValueError, match=r"same, non-zero length.*'\[0\]': 5, '\[1\]': 4.*pass an iterator"):
        agent_optax.refresh(loss_fn, params, opt_state, (x, y[:4]))
    with pytest.raises(ValueError, match=r"same, non-zero length.*'\[0\]': 0"):
        agent_optax.refresh(loss_fn, params, opt_state, (x[:0], y[:0]))
    with pytest.raises(ValueError, match=r"same, non-zero length.*'\[1\]': 'none'"):
        agent_optax.refresh(loss_fn, params, opt_state, (x, jnp.ones(())))
    with pytest.raises(ValueError, match=r"batch 1 has.*\(3, 3\).*Drop the remainder"):
        agent_optax.refresh(loss_fn, params, opt_state, iter([(x[0], y[0]), (x[1, :3], y[1, :3])]))


def test_needs_a_batch():
    params = make_params(1)
    opt_state = agent_optax.agent(0.1).init(params)
    loader = iter(batch_list(make_batches()))
    opt_state = agent_optax.refresh(loss_fn, params, opt_state, loader)
    with pytest.raises(ValueError, match="used up by an earlier pass"):
        agent_optax.refresh(loss_fn, params, opt_state, loader)
