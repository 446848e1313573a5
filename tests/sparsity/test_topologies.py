"""What the topologies promise beyond their golden numbers: totals, schedules, signs, and steadiness."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import jit

import agent_optax

SHAPES = {"first": (20, 12), "second": (12, 10)}
TOTAL = 360


def make_params(dtype=jnp.float32):
    return {name: jax.random.normal(jax.random.key(k), shape, dtype) for k, (name, shape) in enumerate(SHAPES.items())}


def run(tx, num_steps, params=None, spoil=None):
    """States and parameters, step by step; the gradient of step `spoil` is not finite."""
    params = make_params() if params is None else params
    opt_state = tx.init(params)
    params = agent_optax.mask_params(params, opt_state)
    update = jit(tx.update)
    for t in range(num_steps):
        grads = jax.tree.map(lambda p, t=t: jax.random.normal(jax.random.key(50 + t), p.shape, p.dtype), params)
        if t == spoil:
            grads["first"] = grads["first"].at[3, 3].set(jnp.nan)
        updates, new_state = update(grads, opt_state, params)
        new_params = optax.apply_updates(params, updates)
        yield params, opt_state, new_params, new_state
        params, opt_state = new_params, new_state


def num_active(opt_state):
    return int(opt_state.active_weights.num_active())


def test_snfs_keeps_the_total():
    """Layers change in size; their sum strays by what rounding and full layers cost, and comes back."""
    tx = agent_optax.sparsify(optax.sgd(0.1), agent_optax.snfs(update_every=1, drop_fraction=0.4), sparsity=0.8)
    sizes = set()
    for _, _, params, opt_state in run(tx, 12):
        assert abs(num_active(opt_state) - 72) <= 3
        sizes.add(int(agent_optax.active_masks(opt_state, params)["first"].sum()))
    assert len(sizes) > 1


def test_snfs_with_no_gradient_shares_equally():
    """All statistics are zero: nothing is divided by zero."""
    tx = agent_optax.sparsify(optax.sgd(0.1), agent_optax.snfs(update_every=1), sparsity=0.8)
    params = make_params()
    zeros = jax.tree.map(jnp.zeros_like, params)
    _, opt_state = tx.update(zeros, tx.init(params), params)
    assert abs(num_active(opt_state) - 72) <= 2
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(opt_state.topology_state))


def test_momentum_of_a_spoilt_step_is_left_out():
    tx = agent_optax.sparsify(optax.sgd(0.1), agent_optax.snfs(update_every=2), sparsity=0.8)
    for t, (_, before, _, after) in enumerate(run(tx, 2, spoil=1)):
        if t == 1:
            jax.tree.map(np.testing.assert_array_equal, after.topology_state, before.topology_state)
            assert after.num_skipped_updates == 1 and num_active(after) == num_active(before)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("drop_fraction", [0.0, 0.3])
def test_gradual_pruning_follows_the_cubic(scope, drop_fraction):
    """From a quarter of the weights inactive to 90%, at steps 2, 4, ..., 10; the last update is exact."""
    topology = agent_optax.gradual_pruning(
        stop=10, update_every=2, initial_sparsity=0.25, drop_fraction=drop_fraction, scope=scope
    )
    tx = agent_optax.sparsify(optax.sgd(0.01), topology, sparsity=0.9, distribution=agent_optax.uniform)
    for t, (_, before, params, after) in enumerate(run(tx, 12)):
        step = t + 1
        if step % 2 or step > 10:
            assert num_active(after) == num_active(before)
        else:
            pruned = 0.9 + (0.25 - 0.9) * (1 - (step - 2) / 8) ** 3
            assert num_active(after) == sum(np.ceil(np.round((1 - pruned) * size, 4)) for size in (240, 120))
            assert after.num_grown == 0 or drop_fraction > 0
            if step == 10:
                assert after.num_grown == 0
        masks = agent_optax.active_masks(after, params)
        assert all(not np.any(np.asarray(params[name])[~np.asarray(mask)]) for name, mask in masks.items())
        if step >= 10 and scope == "layer":
            assert [int(mask.sum()) for mask in masks.values()] == [24, 12]
    assert num_active(after) == 36


def test_regrowth_brings_back_where_the_gradient_is_large():
    topology = agent_optax.gradual_pruning(stop=8, update_every=2, drop_fraction=0.5)
    tx = agent_optax.sparsify(optax.sgd(0.01), topology, sparsity=0.9)
    *_, (params, before, _, after) = run(tx, 6)
    grown = np.asarray(after.active_masks(params)["first"] & ~before.active_masks(params)["first"])
    assert after.num_grown > 0 and np.any(grown)
    grads = np.abs(np.asarray(jax.random.normal(jax.random.key(55), grown.shape)))  # of step 6
    still_inactive = np.asarray(~after.active_masks(params)["first"] & ~before.active_masks(params)["first"])
    assert grads[grown].min() > grads[still_inactive].max()


def test_pruning_starts_from_given_masks():
    params = make_params()
    masks = agent_optax.magnitude_masks(params, 0.5)
    topology = agent_optax.gradual_pruning(stop=4, update_every=2)
    tx = agent_optax.sparsify(optax.sgd(0.01), topology, masks=masks, sparsity=0.9, distribution=agent_optax.uniform)
    steps = list(run(tx, 4))
    assert num_active(steps[0][1]) == 180 and num_active(steps[-1][3]) == 36
    ends = agent_optax.active_masks(steps[-1][3], params)
    assert all(np.all(masks[name] | ~ends[name]) for name in masks)  # nothing grew


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_bayesian_rewiring(dtype):
    """Weights keep their signs for ever, connections never fall below K, disconnected weights are exactly zero."""
    topology = agent_optax.bayesian_rewiring(0.1, steps_per_epoch=10, noise_scale=1e-3)
    tx = agent_optax.sparsify(optax.sgd(0.1, momentum=0.9), topology, sparsity=0.8)
    params = make_params(dtype)
    signs = {name: np.sign(np.asarray(p, np.float32)) for name, p in params.items()}
    num_dropped = num_grown = 0
    for _, _, after_params, state in run(tx, 10, params):
        masks = agent_optax.active_masks(state, after_params)
        for name, p in after_params.items():
            assert p.dtype == dtype
            p, mask = np.asarray(p, np.float32), np.asarray(masks[name])
            assert np.all(p[~mask] == 0) and np.all(p * signs[name] >= 0)
            # A weight that left and came back in one step is 0 for a step.
            assert np.sum(p[mask] == 0) == np.sum(np.asarray(state.active_weights.latent_weights[name])[mask] != 0)
        assert num_active(state) >= 72
        num_dropped, num_grown = num_dropped + int(state.num_dropped), num_grown + int(state.num_grown)
    assert num_dropped > 0 and num_grown > 0
    assert state.exploration_rate() > 0.2


def test_a_weight_that_leaves_and_comes_back_at_once():
    """It starts anew from 1e-12, whatever it was."""
    tx = agent_optax.sparsify(
        optax.sgd(1.0), agent_optax.bayesian_rewiring(0.0, steps_per_epoch=1, density=1.0), sparsity=0.0
    )
    params = jnp.array([[0.5, 2.0], [3.0, -0.25]])
    opt_state = tx.init(params)
    updates, opt_state = tx.update(jnp.array([[1.0, 0.0], [0.0, -1.0]]), opt_state, params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params, [[0.0, 2.0], [3.0, 0.0]])
    assert num_active(opt_state) == 4
    updates, opt_state = tx.update(jnp.array([[-0.125, 0.0], [0.0, 0.0]]), opt_state, params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params, np.float32([[0.125 + 1e-12, 2.0], [3.0, -1e-12]]))
    assert not np.any(opt_state.active_weights.latent_weights)


def test_noise_is_that_of_the_equation():
    """With gradients of zero and no decay, connected weights move by sqrt(2 lr / B) sigma; others stay."""
    topology = agent_optax.bayesian_rewiring(
        optax.linear_schedule(0.2, 0.1, 1), steps_per_epoch=4, noise_scale=lambda count: 1e-3 * (count + 1)
    )
    tx = agent_optax.sparsify(optax.sgd(1.0), topology, sparsity=0.5, distribution=agent_optax.uniform)
    params = {"kernel": jnp.full((200, 100), 5.0)}
    opt_state = tx.init(params)
    params = agent_optax.mask_params(params, opt_state)
    zeros = jax.tree.map(jnp.zeros_like, params)
    for lr, sigma in ((0.2, 1e-3), (0.1, 2e-3)):
        updates, opt_state = tx.update(zeros, opt_state, params)
        moved = np.asarray(updates["kernel"])[np.asarray(params["kernel"]) != 0]
        assert moved.size == 10000 and np.count_nonzero(updates["kernel"]) <= 10000
        std = np.sqrt(2 * lr / 4) * sigma
        assert abs(moved.std() / std - 1) < 5 / np.sqrt(2 * 10000)  # five standard errors
        assert abs(moved.mean()) < 5 * std / 100


def test_a_spoilt_step_disconnects_nothing():
    topology = agent_optax.bayesian_rewiring(0.1, steps_per_epoch=10)
    tx = agent_optax.sparsify(optax.sgd(0.1), topology, sparsity=0.8)
    *_, (_, before, _, after) = run(tx, 3, spoil=2)
    jax.tree.map(np.testing.assert_array_equal, after.active_weights.is_connected, before.active_weights.is_connected)
    jax.tree.map(
        np.testing.assert_array_equal, after.active_weights.latent_weights, before.active_weights.latent_weights
    )
    assert after.num_skipped_updates == 1


def test_bayesian_correction_is_unbiased_at_disconnected_weights():
    """A weight that left since the snapshot has an old gradient and a mean gradient, or neither: their mean is zero."""
    batches = jax.random.normal(jax.random.key(9), (6, 20, 12))

    def loss(params, batch):
        return jnp.sum(params["first"] * batch) + 0.5 * jnp.sum(params["second"] ** 2)

    inner = optax.chain(
        agent_optax.correct_gradients(coefficient=agent_optax.constant(1.0), scaling=1.0), optax.sgd(0.3)
    )
    tx = agent_optax.sparsify(inner, agent_optax.bayesian_rewiring(0.1, steps_per_epoch=6, density=0.0), sparsity=0.5)
    params = make_params()
    opt_state = tx.init(params)
    params = agent_optax.mask_params(params, opt_state)
    opt_state = agent_optax.refresh(loss, params, opt_state, batches)
    snapshot = agent_optax.snapshot_params(opt_state, params)
    jax.tree.map(np.testing.assert_array_equal, snapshot, params)
    mean = optax.tree.get(opt_state, "mean_grads")["first"]
    at_snapshot = np.asarray(params["first"]) != 0
    np.testing.assert_allclose(mean, np.where(at_snapshot, np.asarray(batches).mean(0), 0), rtol=1e-5, atol=1e-6)
    grads_fn = agent_optax.value_and_grads(loss)
    stayed = at_snapshot
    for batch in batches:
        (_, grads), extras = grads_fn(params, opt_state, batch)
        updates, opt_state = tx.update(grads, opt_state, params, **extras)
        params = optax.apply_updates(params, updates)
        stayed = stayed & (np.asarray(params["first"]) != 0)
    assert np.any(at_snapshot & (np.asarray(params["first"]) == 0))  # some left
    # Over a whole pass the corrections cancel: a weight that stayed moved by the mean gradient, six times.
    moved = np.asarray(params["first"] - snapshot["first"])[stayed]
    np.testing.assert_allclose(moved, -0.3 * 6 * np.asarray(mean)[stayed], rtol=1e-3, atol=1e-4)


def test_selection_over_several_arrays():
    """Ties go to the first array and the lowest index; arrays of different dtypes are compared as numbers."""
    from agent_optax.sparsity.selection._top_k import select_jointly

    scores = [jnp.array([1.0, 3.0, 2.0]), jnp.array([[3.0, 0.5]], jnp.bfloat16), jnp.zeros((0,))]
    expected = {0: [], 1: [1], 2: [1, 3], 3: [1, 2, 3], 4: [0, 1, 2, 3], 5: [0, 1, 2, 3, 4]}
    for k, chosen in expected.items():
        masks = select_jointly(scores, k)
        assert np.flatnonzero(np.concatenate([np.ravel(mask) for mask in masks])).tolist() == chosen
    ties = select_jointly([jnp.ones(3), jnp.ones((2, 2))], 4)
    assert [mask.sum().item() for mask in ties] == [3, 1] and ties[1][0, 0]
