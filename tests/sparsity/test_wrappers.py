"""What stands outside a sparse optimizer: it works with arrays in both storages, or names the remedy."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import jit
from sparse_loop import train

import agent_optax

NUM_STEPS, UPDATE_EVERY, NUM_ACTIVE = 6, 3, 12
MASK = np.zeros((6, 5), bool)
MASK.flat[np.random.default_rng(1).choice(30, NUM_ACTIVE, replace=False)] = True
PARAMS = {"kernel": jax.random.normal(jax.random.key(0), (6, 5)), "bias": jnp.linspace(-1, 1, 5)}
both_storages = pytest.mark.parametrize("storage", ["dense", "compact"])

WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "clip": lambda tx: optax.chain(tx, optax.clip_by_global_norm(0.1)),
    "scale": lambda tx: optax.chain(tx, optax.scale(0.5)),
    "ema": lambda tx: optax.chain(tx, optax.ema(0.9)),
    "momentum": lambda tx: optax.chain(tx, optax.trace(0.5)),
    "nonnegative": lambda tx: optax.chain(tx, optax.keep_params_nonnegative()),
    "decay": lambda tx: optax.chain(tx, optax.add_decayed_weights(-0.01)),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
    "schedule_free": lambda tx: optax.contrib.schedule_free(tx, 0.1, b1=0.9),
    "inject": lambda tx: optax.inject_hyperparams(lambda factor: optax.chain(tx, optax.scale(factor)))(factor=0.5),
    "conditional": lambda tx: optax.conditionally_mask(tx, lambda step: step % 2 == 0),
}


def sparse(storage: str = "dense", topology: Any = None, inner: Any = None, **options: Any) -> Any:
    topology = agent_optax.rigl(UPDATE_EVERY) if topology is None else topology
    masks = {"kernel": MASK, "bias": None}
    inner = optax.sgd(0.1, momentum=0.5) if inner is None else inner
    return agent_optax.sparsify(inner, topology, masks=masks, storage=storage, **options)


def run(tx: Any) -> Any:
    """The parameters before each step and after the last; the gradient is not zero where a parameter is."""

    def gradient(params: Any, step: jax.Array) -> Any:
        key = jax.random.fold_in(jax.random.key(1), step)
        return jax.tree.map(lambda p: p + jax.random.normal(key, p.shape), params)

    params, _, before = train(tx, PARAMS, gradient, NUM_STEPS)
    return jax.tree.map(lambda first, last: jnp.concatenate([first, last[None]]), before, params)


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_alike_in_both_storages(name: str) -> None:
    dense, compact = (run(WRAPPERS[name](sparse(storage))) for storage in ("dense", "compact"))
    chex.assert_trees_all_close(dense, compact, rtol=1e-5, atol=1e-6)
    assert np.ptp(dense["kernel"], axis=0).any()  # it trains


@pytest.mark.parametrize("storage", ["dense", "compact"])
@pytest.mark.parametrize("name", ["apply_if_finite", "clip", "scale", "MultiSteps", "conditional"])
def test_wrapped_is_wrapped_around_active_entries(name: str, storage: str) -> None:
    """Static: the same wrapper around the plain optimizer, on the active entries alone."""
    tx = WRAPPERS[name](sparse(storage, agent_optax.static()))
    opt_state, params = tx.init(PARAMS), agent_optax.mask_params(PARAMS, tx.init(PARAMS))
    plain = WRAPPERS[name](optax.sgd(0.1, momentum=0.5))
    entries = lambda tree: {**tree, "kernel": tree["kernel"][MASK]}  # noqa: E731
    plain_params = entries(params)
    plain_state = plain.init(plain_params)
    update, plain_update = jit(tx.update), jit(plain.update)
    for key in jax.random.split(jax.random.key(1), 4):
        grads = jax.tree.map(lambda p, key=key: jax.random.normal(key, p.shape), params)
        updates, opt_state = update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        updates, plain_state = plain_update(entries(grads), plain_state, plain_params)
        plain_params = optax.apply_updates(plain_params, updates)
    chex.assert_trees_all_close(entries(params), plain_params, rtol=1e-5)
    np.testing.assert_array_equal(params["kernel"][~MASK], 0)


def test_a_wrapper_that_skips_steps_skips_them_wholly() -> None:
    tx = optax.apply_if_finite(sparse("compact"), 3)
    params = agent_optax.mask_params(PARAMS, opt_state := tx.init(PARAMS))
    broken = jax.tree.map(lambda p: p.at[0].set(jnp.nan), params)
    updates, after = jit(tx.update)(broken, opt_state, params)
    assert optax.tree.norm(updates) == 0
    chex.assert_trees_all_equal(after.inner_state, opt_state.inner_state)


def test_norms_and_sums_of_updates_are_those_of_dense_storage() -> None:
    grads = jax.tree.map(jnp.cos, PARAMS)
    seen = [grads["kernel"][MASK], grads["bias"]]
    norms = {}
    for storage in ("dense", "compact"):
        tx = sparse(storage)
        params = agent_optax.mask_params(PARAMS, opt_state := tx.init(PARAMS))
        updates, _ = tx.update(grads, opt_state, params)
        norms[storage] = optax.tree.norm(updates)
        assert norms[storage] == pytest.approx(0.1 * np.sqrt(sum(np.sum(np.square(g)) for g in seen)), rel=1e-6)
    np.testing.assert_allclose(norms["dense"], norms["compact"], rtol=1e-6)


@pytest.mark.parametrize("name", ["clip", "scale", "ema", "momentum", "decay", "apply_if_finite", "MultiSteps"])
def test_sparse_updates_name_the_remedy(name: str) -> None:
    tx = WRAPPERS[name](sparse("compact", updates="sparse"))
    with pytest.raises((TypeError, ValueError), match=r"SparseUpdate|updates='arrays'"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


def test_a_weight_average_is_sparse_once_masked() -> None:
    tx, average = sparse(), optax.ema(0.5, debias=False)
    params = agent_optax.mask_params(PARAMS, opt_state := tx.init(PARAMS))
    averages = average.init(params)
    for key in jax.random.split(jax.random.key(1), 2 * UPDATE_EVERY):
        grads = jax.tree.map(lambda p, key=key: jax.random.normal(key, p.shape), params)
        updates, opt_state = jit(tx.update)(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        mean, averages = average.update(params, averages)
    assert jnp.count_nonzero(mean["kernel"]) > NUM_ACTIVE
    masked = agent_optax.mask_params(mean, opt_state)
    active = agent_optax.active_masks(opt_state, params)["kernel"]
    np.testing.assert_array_equal(masked["kernel"], np.where(active, mean["kernel"], 0))


@both_storages
def test_inactive_weights_that_are_not_zero_are_counted(storage: str) -> None:
    """Without `mask_params`, or after something outside moved them: seen at the next topology update."""
    tx = sparse(storage)
    opt_state = tx.init(PARAMS)
    for step in range(1, 2 * UPDATE_EVERY + 1):
        params = PARAMS if step <= UPDATE_EVERY else agent_optax.mask_params(PARAMS, opt_state)
        _, opt_state = jit(tx.update)(jax.tree.map(jnp.cos, PARAMS), opt_state, params)
        expected = {UPDATE_EVERY: 30 - NUM_ACTIVE, 2 * UPDATE_EVERY: 0}.get(step)
        if expected is not None:
            assert int(agent_optax.diagnostics(opt_state)["num_nonzero_inactive"]) == expected


@pytest.mark.parametrize("topology", ["static", "rigl"])
def test_reverse_mode_goes_through_steps(topology: str) -> None:
    """The derivative of a loss after training by the learning rate, against finite differences."""
    topologies = {"static": agent_optax.static(), "rigl": agent_optax.rigl(UPDATE_EVERY)}

    def loss_after(rate: jax.Array, storage: str = "dense") -> jax.Array:
        tx = sparse(storage, topologies[topology], optax.sgd(rate))
        opt_state = tx.init(PARAMS)
        params = agent_optax.mask_params(PARAMS, opt_state)
        for _ in range(UPDATE_EVERY + 1):
            grads = jax.tree.map(lambda p: jnp.tanh(p - 1), params)
            updates, opt_state = tx.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
        return sum(jnp.sum(jnp.cosh(p - 1)) for p in jax.tree.leaves(params))

    slope, after = jit(jax.grad(loss_after))(0.2), jit(loss_after)
    difference = (after(0.205) - after(0.195)) / 0.01
    np.testing.assert_allclose(slope, difference, rtol=2e-2)
    if topology == "rigl":
        with pytest.raises(ValueError, match="storage='dense'"):
            jax.grad(loss_after)(0.2, "compact")


@pytest.mark.parametrize(("storage", "updates"), [("dense", "arrays"), ("compact", "arrays"), ("compact", "sparse")])
def test_weights_that_were_never_masked_are_counted_without_a_topology_update(storage: str, updates: str) -> None:
    """Arrays make them zero in the first step; sparse updates never reach them."""
    tx = sparse(storage, agent_optax.static(), updates=updates)

    @jit
    def step(params: Any, opt_state: Any) -> Any:
        updates, opt_state = tx.update(jax.tree.map(jnp.cos, params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params, opt_state = PARAMS, tx.init(PARAMS)
    inactive = 30 - NUM_ACTIVE
    for expected in (inactive, inactive if updates == "sparse" else 0):
        assert int(agent_optax.diagnostics(opt_state, params)["num_nonzero_inactive"]) == expected
        params, opt_state = step(params, opt_state)
