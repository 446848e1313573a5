"""Bayesian rewiring is that of A-BSR-Net: weights, signs, and how many connections are regrown."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import jit

import agent_optax

NEW = np.float32(1e-12)


def latent(numbers, name="theta"):
    return [jnp.asarray(numbers[f"{name}_{layer}"]) for layer in range(3)]


def connections(tx, theta, sign):
    """Weights and state in which `theta` is the latent weight of every position."""
    opt_state = tx.init([s * jnp.abs(t) + s * 1e-3 for t, s in zip(theta, sign, strict=True)])  # fixes the signs
    connected = [t > 0 for t in theta]
    params = [jnp.where(c, s * t, 0.0) for c, s, t in zip(connected, sign, theta, strict=True)]
    hidden = [jnp.where(c, 0.0, s * t) for c, s, t in zip(connected, sign, theta, strict=True)]
    active = opt_state.active_weights._replace(is_connected=connected, latent_weights=hidden, ever_active=connected)
    return params, opt_state._replace(active_weights=active)


def thetas(params, opt_state):
    active = opt_state.active_weights
    return [
        np.asarray(s * jnp.where(c, p, h))
        for s, c, p, h in zip(active.signs, active.is_connected, params, active.latent_weights, strict=True)
    ]


@pytest.fixture(scope="module")
def numbers(golden):
    return golden("rewire_bsr")


def still(density):
    topology = agent_optax.bayesian_rewiring(0.0, steps_per_epoch=1, density=density)
    return agent_optax.sparsify(optax.sgd(1.0), topology, sparsity=0.5, distribution=agent_optax.uniform)


def test_weights_and_gradients(numbers):
    """W = sign * theta where theta > 0; a step moves theta of connected weights by sign * dW and no other."""
    theta, sign, grads = latent(numbers), latent(numbers, "sign"), latent(numbers, "dW")
    tx = still(density=0.0)
    params, opt_state = connections(tx, theta, sign)
    for layer in range(3):
        np.testing.assert_array_equal(params[layer], numbers[f"W_{layer}"])
        assert opt_state.active_weights.masks()[layer].sum() == numbers[f"nconn_{layer}"]
    small = [1e-6 * g for g in grads]  # no weight changes its sign
    updates, opt_state = tx.update(small, opt_state, params)
    after = thetas(optax.apply_updates(params, updates), opt_state)
    for layer in range(3):
        expected = numbers[f"theta_{layer}"] - 1e-6 * numbers[f"dtheta_{layer}"]
        np.testing.assert_allclose(after[layer], expected, rtol=1e-6, atol=1e-12)


def test_number_of_new_connections(numbers):
    """As many as are missing, each starting at 1e-12 with the sign of its position; all else stays as it is."""
    theta, sign = latent(numbers), latent(numbers, "sign")
    tx = still(density=float(numbers["p_global"]))
    params, opt_state = connections(tx, theta, sign)
    assert opt_state.topology_state == numbers["K"]
    zeros = [jnp.zeros_like(p) for p in params]
    updates, opt_state = tx.update(zeros, opt_state, params)
    params = optax.apply_updates(params, updates)
    assert opt_state.num_grown == numbers["n_new"] > 0 and opt_state.num_dropped == 0
    for layer, after in enumerate(thetas(params, opt_state)):
        before, published = numbers[f"theta_{layer}"], numbers[f"theta_after_{layer}"]
        is_new = (before <= 0) & (after > 0)
        np.testing.assert_array_equal(after[~is_new], before[~is_new])
        assert np.all(after[is_new] == NEW)
        np.testing.assert_array_equal(np.asarray(params[layer])[is_new], (sign[layer] * NEW)[is_new])
        was_new = (before <= 0) & (published > 0)
        assert np.all(published[was_new] == NEW)  # theirs does the same


def test_split_over_layers(numbers):
    """In proportion to the size of the layers."""
    tx = still(density=float(numbers["p_global"]))
    params, opt_state = connections(tx, latent(numbers), latent(numbers, "sign"))
    zeros = [jnp.zeros_like(p) for p in params]
    num_keys = 1000
    keys = jax.random.bits(jax.random.key(3), (num_keys, *opt_state.topology_key.shape), jnp.uint32)

    @jit
    def draw(keys):
        def new(key):
            masks = tx.update(zeros, opt_state._replace(topology_key=key), params)[1].active_weights.is_connected
            return jnp.stack([jnp.sum(m) for m in masks])

        return jax.vmap(new)(keys)

    grown = np.asarray(draw(keys)) - [int(numbers[f"nconn_{layer}"]) for layer in range(3)]
    n, chance = int(numbers["n_new"]), numbers["split_prob"]
    assert np.all(grown.sum(1) == n)
    sizes = np.array([numbers[f"theta_{layer}"].size for layer in range(3)])
    np.testing.assert_allclose(chance, sizes / sizes.sum(), rtol=1e-6)
    error = np.sqrt(n * chance * (1 - chance))
    assert np.all(np.abs(grown.mean(0) - n * chance) < 5 * error / np.sqrt(num_keys))
    assert np.all(np.abs(numbers["split_mean_400"] - n * chance) < 5 * error / np.sqrt(400))  # and so are theirs


def test_a_surplus_stays(numbers):
    assert numbers["surplus_changes"] == 0
    tx = still(density=0.01)
    params, opt_state = connections(tx, latent(numbers), latent(numbers, "sign"))
    updates, opt_state = tx.update([jnp.zeros_like(p) for p in params], opt_state, params)
    assert opt_state.num_grown == opt_state.num_dropped == 0
    assert all(not np.any(u) for u in updates)


@pytest.mark.parametrize("network", ["vgg16_p010", "vgg16_p100", "resnet18_p010"])
def test_initial_connections(golden, network):
    """Exactly the published number in each layer, from densities leaf by leaf, and the number to fill up to."""
    numbers = golden("init_bsr")
    shapes = [tuple(int(n) for n in row if n > 0) for row in numbers[f"{network}_shapes"]]
    assert [math.prod(shape) for shape in shapes] == numbers[f"{network}_sizes"].tolist()
    density = {"p010": 0.01, "p100": 0.1}[network.rpartition("_")[2]]
    sparsity = [1 - n / size for n, size in zip(numbers[f"{network}_n_init"], numbers[f"{network}_sizes"], strict=True)]
    tx = agent_optax.sparsify(
        optax.sgd(0.1), agent_optax.bayesian_rewiring(0.1, 391, density=density), sparsity=sparsity
    )
    params = [np.ones(shape, np.float32) for shape in shapes[-3:]]  # the last three stand for all: the rule is by leaf
    small = agent_optax.sparsify(
        optax.sgd(0.1), agent_optax.bayesian_rewiring(0.1, 391, density=density), sparsity=sparsity[-3:]
    )
    state = jax.eval_shape(tx.init, [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes])
    assert [leaf.shape for leaf in state.active_weights.is_connected] == shapes
    counts = [int(m.sum()) for m in jit(small.init)(params).active_weights.is_connected]
    assert counts == numbers[f"{network}_n_init"][-3:].tolist()
    total = agent_optax.bayesian_rewiring(0.1, 391, density=density).init(
        None, None, [agent_optax.sparsity._topology.Target(int(n), 0.0, 0, 0) for n in numbers[f"{network}_sizes"]]
    )
    assert total == numbers[f"{network}_K"]
