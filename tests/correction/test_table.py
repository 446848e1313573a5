"""The table memory: SAGA by hand, its mean over many steps, growth, and batches that it cannot place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import jit

import agent_optax

NUM_BATCHES, BATCH_SIZE = 5, 4


def loss_fn(params, batch):
    return jnp.mean(jnp.log(jnp.cosh(batch @ params["kernel"] + params["bias"])))


grad_fn = jit(jax.grad(loss_fn))


def make_params(dtype=np.float32):
    rng = np.random.default_rng(0)
    return {"kernel": jnp.asarray(rng.normal(size=(4, 3)), dtype), "bias": jnp.asarray(rng.normal(size=3), dtype)}


def make_batches(dtype=np.float32):
    return jnp.asarray(np.random.default_rng(1).normal(size=(NUM_BATCHES, BATCH_SIZE, 4)), dtype)


def correction(coefficient, num_batches=NUM_BATCHES, scaling=1.0):
    return agent_optax.correct_gradients(agent_optax.table(num_batches), coefficient, scaling)


def rows_of(opt_state):
    """The rows in the order of batches, as the state's own documentation defines them."""
    state = next(
        s for s in jax.tree.leaves(opt_state, is_leaf=lambda n: hasattr(n, "row_place")) if hasattr(s, "row_place")
    )
    return jax.tree.map(lambda leaf: np.asarray(leaf)[np.asarray(state.row_place)], state.table_grads)


def assert_trees_close(actual, expected, rtol=1e-12, atol=1e-14):
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=rtol, atol=atol), actual, expected)


ORDERS = {
    "cyclic": [0, 1, 2, 3, 4] * 4,
    "shuffled": np.concatenate([np.random.default_rng(seed).permutation(5) for seed in range(5)]),
    "with replacement": np.random.default_rng(4).integers(0, 5, 20),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("weight", [0.6, 1.0])
def test_saga_by_hand(x64, weight, order):
    params, batches = make_params(np.float64), make_batches(np.float64)
    tx = optax.chain(correction(agent_optax.constant(2 * weight), scaling=0.5), optax.sgd(0.3))
    opt_state, update = tx.init(params), jit(tx.update)
    by_hand, table = params, {}
    for index in ORDERS[order]:
        updates, opt_state = update(grad_fn(params, batches[index]), opt_state, params, batch_index=jnp.asarray(index))
        params = optax.apply_updates(params, updates)

        grads = estimate = grad_fn(by_hand, batches[index])
        if index in table:
            mean = jax.tree.map(lambda *rows: sum(rows) / len(rows), *table.values())
            estimate = jax.tree.map(lambda g, old, m: g - weight * (old - m), grads, table[index], mean)
        table[index] = grads
        by_hand = jax.tree.map(lambda p, d: p - 0.3 * d, by_hand, estimate)
        assert_trees_close(params, by_hand)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_sum_stays_the_sum_of_the_rows(dtype):
    """Kept incrementally, the mean drifts by rounding alone.

    The sum of 32 standard normal numbers is about 6, so a step rounds it by up to 4e-7, and 20,000 steps, as a random
    walk, by about 5e-5: 2e-6 in the mean. Five times that is allowed for the largest of 64 entries.
    """
    num_batches, num_steps = 32, 20_000
    tx = correction(agent_optax.constant(1.0), num_batches)
    params = jnp.zeros(64, dtype)

    def step(opt_state, key):
        index_key, grad_key = jax.random.split(key)
        grads = jax.random.normal(grad_key, params.shape, dtype)
        index = jax.random.randint(index_key, (), 0, num_batches)
        return tx.update(grads, opt_state, batch_index=index)[1], None

    keys = jax.random.split(jax.random.key(0), num_steps)
    opt_state, _ = jax.jit(lambda state: jax.lax.scan(step, state, keys))(tx.init(params))
    rows, total = rows_of(opt_state), optax.tree.get(opt_state, "table_sum")
    assert rows.dtype == dtype and total.dtype == jnp.float32
    exact = rows.astype(np.float64).mean(0)
    np.testing.assert_allclose(np.asarray(total) / num_batches, exact, rtol=0, atol=1e-5)
    assert np.abs(exact).max() > 0.1


def test_rows_are_those_of_the_last_visit():
    params, batches = make_params(), make_batches()
    tx = optax.chain(correction(agent_optax.constant(1.0)), optax.sgd(0.3))
    opt_state, expected = tx.init(params), {}
    for index in ORDERS["with replacement"]:
        grads = expected[int(index)] = grad_fn(params, batches[index])
        updates, opt_state = tx.update(grads, opt_state, params, batch_index=int(index))
        params = optax.apply_updates(params, updates)
    rows = rows_of(opt_state)
    for index, grads in expected.items():
        assert_trees_close(jax.tree.map(lambda leaf: leaf[index], rows), grads, rtol=0, atol=0)  # noqa: B023


def test_one_gradient_a_step():
    num_evaluations = 0

    def counted(params, batch):
        nonlocal num_evaluations
        num_evaluations += 1
        return loss_fn(params, batch)

    params = make_params()
    opt_state = correction(agent_optax.loss_regression()).init(params)
    (_, _), extras = agent_optax.value_and_grads(counted)(params, opt_state, make_batches()[0])
    assert num_evaluations == 1 and sorted(extras) == ["value"]


def test_a_step_does_not_copy_the_table():
    """What a compiled step needs beside its donated arguments does not depend on the number of rows."""

    def temporary_bytes(num_batches):
        params = jnp.zeros((256, 256))
        tx = optax.chain(correction(agent_optax.gradient_regression(), num_batches), optax.sgd(0.1, momentum=0.9))

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, opt_state, grads, index):
            updates, opt_state = tx.update(grads, opt_state, params, batch_index=index)
            return optax.apply_updates(params, updates), opt_state

        compiled = step.lower(params, tx.init(params), params, jnp.asarray(0)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(64) < temporary_bytes(4) + 4 * 256 * 256  # less than one row more


def test_loss_regression_is_fed_with_the_loss_of_the_last_visit(x64):
    decay, params, batches = 0.8, make_params(np.float64), make_batches(np.float64)
    tx = optax.chain(correction(agent_optax.loss_regression(decay=decay, clip=False)), optax.sgd(0.5))
    opt_state, last, pairs = tx.init(params), {}, []
    for index in ORDERS["shuffled"]:
        value, grads = jax.value_and_grad(loss_fn)(params, batches[index])
        if index in last:
            pairs.append((float(value), last[index]))
        last[index] = float(value)
        updates, opt_state = tx.update(grads, opt_state, params, batch_index=index, value=value)
        params = optax.apply_updates(params, updates)
    covariance = np.cov(np.array(pairs).T, aweights=decay ** np.arange(len(pairs))[::-1])
    correlation = agent_optax.diagnostics(opt_state)["correlation"]
    np.testing.assert_allclose(correlation, covariance[0, 1] / covariance[1, 1], rtol=1e-10)
    assert len(pairs) == 4 * NUM_BATCHES


def test_gradient_regression_starts_with_the_first_batch_seen_twice(x64):
    params, batches = make_params(np.float64), make_batches(np.float64)
    tx = optax.chain(correction(agent_optax.gradient_regression(decay=0.8, clip=False)), optax.sgd(0.5))
    opt_state, correlations = tx.init(params), []
    for index in [0, 1, 2, 3, 4, 2]:
        rows, grads = rows_of(opt_state), grad_fn(params, batches[index])
        updates, opt_state = tx.update(grads, opt_state, params, batch_index=index)
        params = optax.apply_updates(params, updates)
        correlations.append(float(agent_optax.diagnostics(opt_state)["correlation"]))
    assert correlations[:-1] == [0.0] * 5
    flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])  # noqa: E731
    mean = flat(jax.tree.map(lambda leaf: leaf.mean(0), rows))
    old, new = flat(jax.tree.map(lambda leaf: leaf[2], rows)) - mean, flat(grads) - mean
    np.testing.assert_allclose(correlations[-1], new @ old / (old @ old), rtol=1e-12)


def test_entries_that_are_not_finite_begin_anew():
    """They are not corrected until all batches have been seen again; the others do not notice."""
    tx = correction(agent_optax.constant(1.0), num_batches=2)
    opt_state = tx.init(jnp.zeros(2))
    steps = [  # batch, gradient, estimate by hand
        (0, [4.0, 4.0], [4.0, 4.0]),
        (1, [8.0, 8.0], [8.0, 8.0]),
        (0, [6.0, np.inf], [6 - (4 - 6), np.inf]),  # the rows are now 6, 8 and -, 8
        (1, [2.0, 2.0], [2 - (8 - 7), 2.0]),  # 6, 2 and -, 2
        (1, [4.0, 4.0], [4 - (2 - 4), 4.0]),  # 6, 4 and -, 4
        (0, [2.0, 2.0], [2 - (6 - 5), 2.0]),  # 2, 4 and 2, 4
        (1, [5.0, 5.0], [5 - (4 - 3), 5 - (4 - 3)]),
    ]
    for index, grads, expected in steps:
        estimate, opt_state = tx.update(jnp.asarray(grads), opt_state, batch_index=index)
        np.testing.assert_array_equal(estimate, expected)
        state = opt_state.memory_state._replace(row_loss=jnp.zeros(2))
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


def test_a_gradient_too_large_to_be_summed_does_no_lasting_harm():
    tx = correction(agent_optax.constant(1.0), num_batches=4)
    opt_state = tx.init(jnp.zeros(1))
    for index in [0, 1, 2, 3, 0, 1, 2, 3]:
        size = 3e38 if index == 1 else 1.0
        _, opt_state = tx.update(jnp.full(1, size), opt_state, batch_index=index)
        assert np.isfinite(optax.tree.get(opt_state, "table_sum"))
    for index in [0, 1, 2, 3, 2]:
        estimate, opt_state = tx.update(jnp.full(1, 1.0 + index), opt_state, batch_index=index)
    assert estimate == 3 - (3 - 2.5)


@pytest.mark.parametrize("storage", ["dense", "compact"])
@pytest.mark.parametrize("order", ORDERS)
def test_grown_weights_are_corrected_after_a_full_cycle(storage, order):
    """With RigL: weight by weight, every batch must have been seen since. By hand, with NaN for rows before growth."""
    params, batches = make_params(), make_batches()
    inner = optax.chain(correction(agent_optax.constant(1.0)), optax.sgd(0.3))
    topology = agent_optax.rigl(update_every=4, drop_fraction=0.3, stop=13)
    tx = agent_optax.sparsify(inner, topology, sparsity=0.5, storage=storage)
    opt_state, update = tx.init(params), jit(tx.update)
    params = agent_optax.mask_params(params, opt_state)
    masks = np.asarray(agent_optax.active_masks(opt_state, params)["kernel"])
    table = np.full((NUM_BATCHES, 4, 3), np.nan)  # of the kernel
    is_seen = np.zeros(NUM_BATCHES, bool)
    num_grown = num_waiting = num_corrected = 0
    has_grown = np.zeros((4, 3), bool)
    for index in ORDERS[order]:
        grads = grad_fn(params, batches[index])
        estimate = kernel_grads = np.where(masks, grads["kernel"], 0)
        is_complete = ~np.isnan(table[is_seen]).any(0)
        if is_seen[index]:
            corrected = kernel_grads - (table[index] - table[is_seen].mean(0))
            estimate = np.where(is_complete, corrected, kernel_grads)
            num_waiting += int((masks & ~is_complete).sum())
            num_corrected += int((masks & is_complete & has_grown).sum())
        table[index], is_seen[index] = kernel_grads, True
        updates, opt_state = update(grads, opt_state, params, batch_index=jnp.asarray(index))
        by_hand = params["kernel"] - 0.3 * estimate
        params = optax.apply_updates(params, updates)
        old_masks, masks = masks, np.asarray(agent_optax.active_masks(opt_state, params)["kernel"])
        grown = masks & ~old_masks
        table[:, grown] = np.nan
        has_grown |= grown
        num_grown += int(grown.sum())
        np.testing.assert_allclose(params["kernel"], np.where(masks & old_masks, by_hand, 0), rtol=2e-5, atol=2e-6)
    assert num_grown and num_waiting and num_corrected


def test_without_growth_the_table_is_as_old_as_the_run():
    tx = correction(agent_optax.constant(1.0))
    opt_state = tx.init(make_params())
    for index in range(3):
        _, opt_state = tx.update(make_params(), opt_state, batch_index=index)
    state = opt_state.memory_state
    assert all(np.all(leaf == 3) for leaf in jax.tree.leaves(state.entry_age))
    np.testing.assert_array_equal(state.row_age, [2, 1, 0, -1, -1])


@pytest.mark.parametrize("index", [-1, NUM_BATCHES])
def test_an_index_out_of_range(index):
    """Known: an error. Traced: the step is not corrected, and nothing is written."""
    tx = correction(agent_optax.constant(1.0))
    params = make_params()
    opt_state = tx.init(params)
    for known in range(NUM_BATCHES):
        _, opt_state = tx.update(grad_fn(params, make_batches()[known]), opt_state, batch_index=known)
    for concrete in (index, jnp.asarray(index), np.int64(index)):
        with pytest.raises(ValueError, match=rf"batch_index must lie in 0 \.\.\. 4, got {index}: .*table\(5\)"):
            tx.update(params, opt_state, batch_index=concrete)
    estimate, after = jit(tx.update)(params, opt_state, batch_index=jnp.asarray(index))
    assert_trees_close(estimate, params, rtol=0, atol=0)
    assert_trees_close(rows_of(after), rows_of(opt_state), rtol=0, atol=0)
    for name in ("table_sum", "row_place", "free_place", "row_loss"):
        assert_trees_close(getattr(after.memory_state, name), getattr(opt_state.memory_state, name), rtol=0, atol=0)


def test_errors_name_the_fix():
    tx, params = correction(agent_optax.constant(1.0)), make_params()
    opt_state = tx.init(params)
    with pytest.raises(ValueError, match=r"table\(5\)\) needs the extra argument batch_index=.*batch_index=i"):
        tx.update(params, opt_state)
    for wrong in (1.0, jnp.arange(2), True):
        with pytest.raises(ValueError, match=r"batch_index must be a whole number, got an array of shape"):
            tx.update(params, opt_state, batch_index=wrong)
    for wrong in (0, -3, 2.0, True):
        with pytest.raises(ValueError, match=rf"num_batches must be a whole number of at least 1, got {wrong}"):
            agent_optax.table(wrong)
    tx = correction(agent_optax.loss_regression())
    with pytest.raises(ValueError, match=r"needs the extra argument value="):
        tx.update(params, tx.init(params), batch_index=0)


def test_refresh_says_that_a_table_needs_none():
    params = make_params()
    with pytest.raises(ValueError, match=r"refresh needs a snapshot, but opt_state holds only TableState"):
        agent_optax.refresh(loss_fn, params, correction(agent_optax.constant(1.0)).init(params), make_batches())


def test_rows_of_fast_descent_oppose_the_gradient_and_the_coefficient_stays_0():
    """Far from the minimum each row is larger than the mean of rows, and the new gradient smaller."""
    targets = np.random.default_rng(0).normal(size=(NUM_BATCHES, 3)).astype(np.float32)
    tx = optax.chain(correction(agent_optax.gradient_regression()), optax.sgd(0.3))
    params, rows = jnp.full(3, 100.0), np.zeros_like(targets)
    opt_state, update = tx.init(params), jit(tx.update)
    coefficients = []
    for step in range(2 * NUM_BATCHES):
        index = step % NUM_BATCHES
        grads = params - targets[index]
        if step >= NUM_BATCHES:
            mean = rows.mean(axis=0)
            assert np.sum((np.asarray(grads) - mean) * (rows[index] - mean)) < 0
        rows[index] = grads
        updates, opt_state = update(grads, opt_state, params, batch_index=jnp.asarray(index))
        params = optax.apply_updates(params, updates)
        report = agent_optax.diagnostics(opt_state)
        coefficients.append(float(report["correlation"]))
        assert bool(report["variance_ratio_known"]) == (step >= NUM_BATCHES)
    assert coefficients == [0.0] * (2 * NUM_BATCHES)
