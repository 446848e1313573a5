"""AC/DC and straight-through estimators are what a plain loop of NumPy does, with momentum."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import jit

import agent_optax

SHAPES = {"first": (20, 12), "second": (12, 10)}
NUM_STEPS, RATE, MOMENTUM, SPARSITY = 8, 0.1, 0.9, 0.75
RNG = np.random.default_rng(0)
START = {name: RNG.normal(size=shape) for name, shape in SHAPES.items()}
BATCHES = [{name: RNG.normal(size=shape) for name, shape in SHAPES.items()} for _ in range(NUM_STEPS)]
DENSE = {name: np.ones(shape, bool) for name, shape in SHAPES.items()}


def gradient(weights: Any, batch: Any) -> Any:
    """Of a quadratic loss: it depends on the weights that the network has."""
    return {name: np.asarray(weights[name]) - batch[name] for name in SHAPES}


def loss(params: Any, batch: Any) -> Any:
    return 0.5 * sum(jnp.sum((params[name] - batch[name]) ** 2) for name in SHAPES)


def largest(weights: Any) -> dict[str, np.ndarray]:
    """A quarter of each layer."""
    return {n: np.abs(w) >= np.sort(np.abs(w).ravel())[-w.size // 4] for n, w in weights.items()}


def two_of_four(weights: Any) -> dict[str, np.ndarray]:
    groups = {n: np.abs(w).reshape(-1, 4, w.shape[1]) for n, w in weights.items()}
    ranks = {n: np.argsort(np.argsort(-g, axis=1), axis=1) for n, g in groups.items()}
    return {n: (r < 2).reshape(weights[n].shape) for n, r in ranks.items()}


def run(tx: Any) -> Any:
    """Parameters and state after each step, on gradients at the parameters."""
    params = jax.tree.map(jnp.asarray, START)
    opt_state, update = tx.init(params), jit(tx.update)
    params = agent_optax.mask_params(params, opt_state)
    for batch in BATCHES:
        updates, opt_state = update(gradient(params, batch), opt_state, params)
        params = optax.apply_updates(params, updates)
        yield params, opt_state


def assert_close(params: Any, weights: Any) -> None:
    for name, w in weights.items():
        np.testing.assert_allclose(params[name], w, rtol=1e-11, atol=1e-13)


def masked(masks: Any, weights: Any) -> Any:
    return {name: np.where(masks[name], w, 0) for name, w in weights.items()}


def test_ac_dc(x64):
    """Dense to step 2, sparse to 4, dense to 7, and sparse."""
    switches, sparse_steps = [2, 4, 7], [2, 3, 7, 8]
    tx = agent_optax.sparsify(
        optax.sgd(RATE, MOMENTUM), agent_optax.ac_dc(switches), sparsity=SPARSITY, distribution=agent_optax.uniform
    )
    weights, masks, trace = START, DENSE, {name: np.zeros_like(w) for name, w in START.items()}
    for step, (params, opt_state) in enumerate(run(tx), start=1):
        grads = gradient(weights, BATCHES[step - 1])
        trace = masked(masks, {n: MOMENTUM * trace[n] + g for n, g in grads.items()})
        weights = masked(masks, {n: w - RATE * trace[n] for n, w in weights.items()})
        if step in switches:
            masks = largest(weights) if switches.index(step) % 2 == 0 else DENSE
            weights, trace = masked(masks, weights), masked(masks, trace)
        assert_close(params, weights)
        assert_close(agent_optax.active_masks(opt_state, params), masks)
        report = agent_optax.diagnostics(opt_state)
        assert float(report["sparsity"]) == SPARSITY * (step in sparse_steps)
    assert report["num_topology_updates"] == 3


@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("pattern", [None, agent_optax.n_m(2, 4)], ids=["any", "2:4"])
def test_straight_through(x64, pattern, decay):
    options = {"pattern": pattern} if pattern else {"sparsity": SPARSITY, "distribution": agent_optax.uniform}
    tx = agent_optax.sparsify(optax.sgd(RATE, MOMENTUM), agent_optax.straight_through(decay=decay), **options)
    choose = two_of_four if pattern else largest
    theta, masks, trace = START, choose(START), {name: np.zeros_like(w) for name, w in START.items()}
    num_back = 0
    for step, (params, opt_state) in enumerate(run(tx)):
        grads = gradient(masked(masks, theta), BATCHES[step])
        decayed = {n: g + decay * ~masks[n] * theta[n] for n, g in grads.items()}
        trace = {n: MOMENTUM * trace[n] + g for n, g in decayed.items()}
        theta = {n: w - RATE * trace[n] for n, w in theta.items()}
        before, masks = masks, choose(theta)
        num_back += sum(int(np.sum(masks[n] & ~before[n])) for n in SHAPES)
        assert_close(params, masked(masks, theta))
        assert_close(agent_optax.active_masks(opt_state, params), masks)
        assert opt_state.num_grown == sum(np.sum(masks[n] & ~before[n]) for n in SHAPES)
    assert num_back > 50  # each with what it had become meanwhile


def test_random_masks_of_weights_that_all_positions_keep(x64):
    tx = agent_optax.sparsify(
        optax.sgd(RATE), agent_optax.straight_through(agent_optax.at_random, update_every=2, stop=7), sparsity=SPARSITY
    )
    theta, masks, num_grown = START, None, 0
    for step, (params, opt_state) in enumerate(run(tx), start=1):
        before, masks = masks or largest_of_all_at_the_start(tx), agent_optax.active_masks(opt_state, params)
        grads = gradient(masked(before, theta), BATCHES[step - 1])
        theta = {n: w - RATE * grads[n] for n, w in theta.items()}
        assert_close(params, masked(masks, theta))
        num_kept = sum(int(np.sum(masks[n] & before[n])) for n in SHAPES)
        assert sum(int(mask.sum()) for mask in masks.values()) == 90
        assert num_kept < 60 if step in (2, 4, 6) else num_kept == 90
        num_grown = 90 - num_kept if step in (2, 4, 6) else num_grown  # of the last choice
        assert opt_state.num_grown == opt_state.num_dropped == num_grown
        assert opt_state.num_topology_updates == min(step // 2, 3)


def largest_of_all_at_the_start(tx: Any) -> Any:
    params = jax.tree.map(jnp.asarray, START)
    return jax.tree.map(np.asarray, agent_optax.active_masks(tx.init(params), params))


def test_given_masks_are_the_start():
    masks = {name: RNG.random(shape) < 0.3 for name, shape in SHAPES.items()}
    tx = agent_optax.sparsify(optax.sgd(0.0), agent_optax.straight_through(), masks=masks)
    params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), START)
    opt_state = tx.init(params)
    assert_close(agent_optax.active_masks(opt_state, params), masks)
    masked_params = agent_optax.mask_params(params, opt_state)
    updates, opt_state = tx.update(params, opt_state, masked_params)
    after = optax.apply_updates(masked_params, updates)
    for name, mask in masks.items():  # the same number, of the largest: also of those that were not in the network
        number = int(mask.sum())
        np.testing.assert_array_equal(
            np.sort(np.abs(after[name][after[name] != 0])), np.sort(np.abs(params[name]).ravel())[-number:]
        )


def test_a_spoilt_step_keeps_masks_and_weights():
    tx = agent_optax.sparsify(optax.sgd(RATE), agent_optax.straight_through(), sparsity=SPARSITY)
    *_, (params, before) = run(tx)
    grads = jax.tree.map(jnp.ones_like, params)
    grads["first"] = grads["first"].at[0, 0].set(jnp.inf)
    _, after = jit(tx.update)(grads, before, params)
    assert (after.num_skipped_updates, after.num_topology_updates) == (1, NUM_STEPS)
    for field in ("is_connected", "latent_weights"):
        jax.tree.map(
            np.testing.assert_array_equal, getattr(after.active_weights, field), getattr(before.active_weights, field)
        )


def test_corrections_see_the_gradients_of_all_positions(x64):
    """SVRG: old gradients are those at the network of the snapshot, also where weights are inactive."""
    correction = agent_optax.correct_gradients(coefficient=agent_optax.constant(1.0), scaling=1.0)
    tx = agent_optax.sparsify(
        optax.chain(correction, optax.sgd(RATE)),
        agent_optax.straight_through(),
        sparsity=SPARSITY,
        distribution=agent_optax.uniform,
    )
    params = jax.tree.map(jnp.asarray, START)
    opt_state = tx.init(params)
    params = agent_optax.mask_params(params, opt_state)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *BATCHES)
    opt_state = agent_optax.refresh(loss, params, opt_state, stacked)
    theta, masks = START, largest(START)
    point = masked(masks, theta)
    mean = {n: point[n] - np.mean([batch[n] for batch in BATCHES], axis=0) for n in SHAPES}

    @jit
    def step(params: Any, opt_state: Any, batch: Any) -> Any:
        (_, grads), extras = agent_optax.value_and_grads(loss)(params, opt_state, batch)
        updates, opt_state = tx.update(grads, opt_state, params, **extras)
        return optax.apply_updates(params, updates), opt_state

    for batch in BATCHES:
        params, opt_state = step(params, opt_state, batch)
        new, old = gradient(masked(masks, theta), batch), gradient(point, batch)
        theta = {n: w - RATE * (new[n] - old[n] + mean[n]) for n, w in theta.items()}
        masks = largest(theta)
        assert_close(params, masked(masks, theta))
