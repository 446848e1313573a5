"""MARS by hand, its relation to STORM, and the details on which published versions differ."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import jit

import agent_optax

NUM_STEPS = 6


def loss_fn(params, batch):
    return 20 * jnp.mean(jnp.log(jnp.cosh(batch @ params["kernel"]))) + 0.1 * jnp.sum(params["bias"] ** 2)


grad_fn = jit(jax.grad(loss_fn))
grads_fn = agent_optax.value_and_grads(loss_fn)


def make_params(dtype=np.float64):
    rng = np.random.default_rng(0)
    return {"kernel": jnp.asarray(rng.normal(size=(4, 3)), dtype), "bias": jnp.asarray(rng.normal(size=3), dtype)}


def make_batches(dtype=np.float64):
    return jnp.asarray(np.random.default_rng(1).normal(size=(NUM_STEPS, 8, 4)), dtype)


def assert_trees_close(actual, expected, rtol=1e-10, atol=1e-13):
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=rtol, atol=atol), actual, expected)


def train(tx, params, batches):
    opt_state, history, update = tx.init(params), [], jit(tx.update)
    for batch in batches:
        (_, grads), extras = grads_fn(params, opt_state, batch)
        updates, opt_state = update(grads, opt_state, params, **extras)
        params = optax.apply_updates(params, updates)
        history.append(params)
    return history


def mars_by_hand(params, batches, rate, b1, b2, eps, decay, gamma, exact, max_norm=1.0):
    """Yuan et al., Algorithm 2, with x_0 = x_1 and clipping by tensors."""
    first = {name: np.zeros(p.shape) for name, p in params.items()}
    second = {name: np.zeros(p.shape) for name, p in params.items()}
    last_params, last_grads, num_clipped, history = params, None, 0, []
    for t, batch in enumerate(batches, start=1):
        grads = grad_fn(params, batch)
        old = grad_fn(last_params, batch) if exact else (last_grads or grads)
        last_params, last_grads, new = params, grads, {}
        for name, g in grads.items():
            c = g + gamma * b1 / (1 - b1) * (g - old[name])
            norm = np.linalg.norm(c)
            num_clipped += norm > max_norm
            c = c / norm * max_norm if norm > max_norm else c
            first[name] = b1 * first[name] + (1 - b1) * c
            second[name] = b2 * second[name] + (1 - b2) * c**2
            m, v = first[name] / (1 - b1**t), second[name] / (1 - b2**t)
            new[name] = params[name] - rate * (m / (np.sqrt(v) + eps) + decay * params[name])
        params = new
        history.append(params)
    return history, num_clipped


@pytest.mark.parametrize("exact", [False, True])
def test_by_hand(x64, exact):
    settings = {"b1": 0.9, "b2": 0.95, "eps": 1e-3, "gamma": 0.05}
    params, batches = make_params(), make_batches()
    history = train(agent_optax.mars(0.1, weight_decay=0.2, exact=exact, **settings), params, batches)
    by_hand, num_clipped = mars_by_hand(params, batches, 0.1, decay=0.2, exact=exact, **settings)
    assert_trees_close(history, by_hand)
    assert NUM_STEPS <= num_clipped < 2 * NUM_STEPS  # the kernel's gradient, not always the bias's


def test_exact_and_approximate_differ(x64):
    params, batches = make_params(), make_batches()
    runs = [train(agent_optax.mars(0.1, exact=exact), params, batches)[-1]["kernel"] for exact in (False, True)]
    assert np.abs(runs[0] - runs[1]).max() > 1e-3


def test_defaults_are_the_authors(x64):
    params, batches = make_params(), make_batches()
    by_hand, _ = mars_by_hand(params, batches, 3e-3, 0.95, 0.99, 1e-8, 0.0, 0.025, exact=False)
    assert_trees_close(train(agent_optax.mars(3e-3), params, batches), by_hand, rtol=1e-8)


@pytest.mark.parametrize("exact", [False, True])
def test_nothing_corrected_and_nothing_clipped_is_adamw(exact):
    params, batches = make_params(np.float32), make_batches(np.float32)
    tx = agent_optax.mars(0.1, 0.9, 0.99, weight_decay=0.1, gamma=0.0, exact=exact, max_norm=None)
    assert_trees_close(
        train(tx, params, batches), train(optax.adamw(0.1, 0.9, 0.99, weight_decay=0.1), params, batches), rtol=1e-5
    )


def test_the_whole_correction_makes_momentum_storm(x64):
    """With gamma = 1 a momentum of c follows STORM's recursion with a = 1 - b1.

    They differ by their first value, (1 - b1) g and g, and that difference decays as b1^t.
    """
    b1, rng = 0.8, np.random.default_rng(2)
    momentum = optax.chain(agent_optax.mars_correction(b1, gamma=1.0, exact=True, max_norm=None), optax.ema(b1, False))
    storm = agent_optax.correct_gradients(agent_optax.recursion(), agent_optax.constant(b1), scaling=1.0)
    params = jnp.zeros(3)
    states, first = [momentum.init(params), storm.init(params)], None
    for t in range(8):
        grads, old_grads = (jnp.asarray(rng.normal(size=3)) for _ in range(2))
        old_grads = grads if t == 0 else old_grads
        first = grads if t == 0 else first
        m, states[0] = momentum.update(grads, states[0], params, old_grads=old_grads)
        d, states[1] = storm.update(grads, states[1], params, old_grads=old_grads)
        np.testing.assert_allclose(d - m, b1 ** (t + 1) * first, rtol=1e-10)


@pytest.mark.parametrize("exact", [False, True])
def test_the_first_step_is_not_corrected(exact):
    tx = agent_optax.mars_correction(exact=exact, gamma=1.0, max_norm=None)
    params = {"w": jnp.asarray([3.0, -4.0])}
    opt_state = tx.init(params)
    estimate, opt_state = tx.update(params, opt_state, params, old_grads=params)
    assert_trees_close(estimate, params, rtol=0)


def test_clipping_is_by_tensor_and_keeps_directions():
    tx = agent_optax.mars_correction(gamma=0.0, max_norm=2.0)
    grads = {"long": jnp.asarray([[30.0, -40.0]]), "short": jnp.asarray([0.6, 0.8]), "none": jnp.zeros(2)}
    estimate, _ = tx.update(grads, tx.init(grads))
    assert_trees_close(estimate, {**grads, "long": jnp.asarray([[1.2, -1.6]])}, rtol=1e-6)


def test_bf16_is_clipped_by_its_float32_norm():
    """The norm of 40,000 ones is 200; their sum in bfloat16 would stop growing at 256."""
    tx = agent_optax.mars_correction(gamma=0.0, max_norm=1.0)
    grads = jnp.ones(40_000, jnp.bfloat16)
    estimate, _ = tx.update(grads, tx.init(grads))
    assert estimate.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(estimate, np.float32), 1 / 200, rtol=1 / 256)


def test_it_goes_before_any_optimizer():
    params, batches = make_params(np.float32), make_batches(np.float32)
    for inner in (optax.lion(1e-2, b1=0.95), optax.contrib.muon(1e-2), optax.sgd(1e-2, momentum=0.95)):
        tx = optax.chain(agent_optax.mars_correction(), inner)
        moved = train(tx, params, batches)[-1]
        plain = train(inner, params, batches)[-1]
        assert np.abs(moved["kernel"] - plain["kernel"]).max() > 1e-4


@pytest.mark.parametrize("exact", [False, True])
def test_gradients_that_are_not_finite_are_forgotten(exact):
    tx = agent_optax.mars_correction(0.5, gamma=0.5, exact=exact, max_norm=None)  # c = g + (g - old) / 2
    params = jnp.zeros(2)
    opt_state = tx.init(params)
    steps = [([1.0, 1.0], [1.0, 1.0]), ([np.nan, 2.0], [1.0, 1.0]), ([4.0, 4.0], [3.0, 2.0])]
    for grads, old in steps:
        estimate, opt_state = tx.update(jnp.asarray(grads), opt_state, params, old_grads=jnp.asarray(old))
        state = [leaf for leaf in jax.tree.leaves(opt_state) if leaf.shape == (2,)]
        assert all(np.all(np.isfinite(leaf)) for leaf in state)
    expected = [4 + (4 - 3) / 2, 4 + (4 - 2) / 2] if exact else [4 + (4 - 1) / 2, 4 + (4 - 2) / 2]
    np.testing.assert_array_equal(estimate, expected)


@pytest.mark.parametrize("storage", ["dense", "compact"])
@pytest.mark.parametrize("exact", [False, True])
def test_grown_weights_are_not_corrected_in_their_first_step(exact, storage):
    """A weight that grows has no last gradient: c = g there, and c = g + w (g - g_old) at the survivors."""
    params, batches = make_params(np.float32), make_batches(np.float32)
    inner = optax.chain(agent_optax.mars_correction(0.5, 0.8, exact, max_norm=None), optax.sgd(0.05))
    tx = agent_optax.sparsify(inner, agent_optax.rigl(2, 0.5), sparsity=0.5, storage=storage)
    opt_state, update = tx.init(params), jit(tx.update)
    params = agent_optax.mask_params(params, opt_state)
    old_masks = masks = agent_optax.active_masks(opt_state, params)["kernel"]
    last_grads, num_grown = None, 0
    for batch in batches[:5]:
        (_, grads), extras = grads_fn(params, opt_state, batch)
        kernel_grads = jnp.where(masks, grads["kernel"], 0)
        old = extras["old_grads"]["kernel"] if exact else last_grads
        grown = masks & ~old_masks
        num_grown += int(grown.sum())
        estimate = kernel_grads
        if old is not None:
            estimate = jnp.where(grown, estimate, estimate + 0.8 * (estimate - old))
        last_grads = kernel_grads
        updates, opt_state = update(grads, opt_state, params, **extras)
        by_hand = params["kernel"] - 0.05 * estimate
        params = optax.apply_updates(params, updates)
        old_masks, masks = masks, agent_optax.active_masks(opt_state, params)["kernel"]
        survives = masks & old_masks
        np.testing.assert_allclose(params["kernel"], jnp.where(survives, by_hand, 0), rtol=1e-5, atol=1e-5)
    assert num_grown >= 2


def test_inactive_entries_do_not_shorten_a_clipped_gradient(x64):
    """Under sparsify the norm is that of active entries, although old gradients are given for all."""
    params, batches = make_params(), make_batches()
    inner = optax.chain(agent_optax.mars_correction(gamma=1.0, exact=True), optax.sgd(1.0))
    tx = agent_optax.sparsify(inner, agent_optax.static(), sparsity=0.7)
    opt_state = tx.init(params)
    params = agent_optax.mask_params(params, opt_state)
    for batch in batches[:3]:
        (_, grads), extras = grads_fn(params, opt_state, batch)
        updates, opt_state = jit(tx.update)(grads, opt_state, params, **extras)
        mask = agent_optax.active_masks(opt_state, params)["kernel"]
        np.testing.assert_allclose(np.linalg.norm(np.where(mask, updates["kernel"], 0)), 1.0, rtol=1e-10)
        params = optax.apply_updates(params, updates)


def test_gradient_regression_has_nothing_to_regress():
    tx = agent_optax.correct_gradients(agent_optax.difference(), agent_optax.gradient_regression(), scaling=1.0)
    opt_state = tx.init(jnp.zeros(2))
    for seed in range(3):
        grads = jax.random.normal(jax.random.key(seed), (2,))
        estimate, opt_state = tx.update(grads, opt_state)
        assert_trees_close(estimate, grads, rtol=0)
    assert agent_optax.diagnostics(opt_state)["correlation"] == 0


def test_errors_name_the_fix():
    with pytest.raises(ValueError, match=r"b1 must lie in \[0, 1\), got 1\.0"):
        agent_optax.mars(0.1, b1=1.0)
    with pytest.raises(ValueError, match=r"gamma must be a finite number, got nan"):
        agent_optax.mars_correction(gamma=float("nan"))
    with pytest.raises(ValueError, match=r"max_norm must be positive, got -1\.0: None does not clip"):
        agent_optax.mars_correction(max_norm=-1.0)
    tx, params = agent_optax.mars(0.1, exact=True), make_params(np.float32)
    with pytest.raises(ValueError, match=r"difference\(exact=True\)\) needs the extra argument old_grads="):
        tx.update(params, tx.init(params), params)
    tx = agent_optax.mars_correction(exact=True)
    with pytest.raises(ValueError, match=r"difference\(exact=True\)\) remembers the parameters"):
        tx.update(params, tx.init(params), old_grads=params)
