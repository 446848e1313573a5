"""Other rules of A-ITOP by which weights are dropped and positions grown."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import jit

import agent_optax

LAYERS = (0, 1, 2)
RATES = (0, 1, 2, 3)  # indices; each is that of a step, so that one compiled update serves all


@pytest.fixture(scope="module")
def numbers(golden):
    return golden("death_growth_itop")


@pytest.fixture(scope="module")
def replace(numbers):
    """`replace(rate, **rule)`: (weights, masks) after one update at a learning rate of 0 by `drop_and_grow(**rule)`."""
    compiled = {}

    def run(rate, average=None, ever_active=None, **rule):
        key = tuple(sorted((name, str(part)) for name, part in rule.items()))
        if key not in compiled:
            topology = agent_optax.drop_and_grow(
                **rule, update_every=1, drop_fraction=lambda step: jnp.asarray(numbers["rates"])[step - 1]
            )
            tx = agent_optax.sparsify(
                optax.set_to_zero(), topology, masks=[numbers[f"mask_{layer}"] for layer in LAYERS]
            )
            compiled[key] = tx.init, jit(tx.update)
        init, update = compiled[key]
        weights = [jnp.asarray(numbers[f"w_{layer}"]) for layer in LAYERS]
        grads = [jnp.asarray(numbers[f"g_{layer}"]) for layer in LAYERS]
        opt_state = init(weights)._replace(topology_step=jnp.asarray(rate, jnp.int32))
        if average is not None:
            beta = rule["momentum"]  # the average takes this step's gradient in before the update sees it
            before = [(m - (1 - beta) * g) / beta for m, g in zip(average, grads, strict=True)]
            opt_state = optax.tree.set(opt_state, gradient_momentum=before)
        if ever_active is not None:
            opt_state = optax.tree.set(opt_state, ever_active=ever_active)
        updates, opt_state = update(grads, opt_state, weights)
        params = optax.apply_updates(weights, updates)
        return params, [np.asarray(mask) for mask in agent_optax.active_masks(opt_state, params)]

    return run


def before(numbers, layer):
    return numbers[f"mask_{layer}"].astype(bool)


def num_replaced(numbers, rate, layer):
    return int(np.ceil(numbers["rates"][rate] * before(numbers, layer).sum()))


def stay_away(layer, key):
    """A growth score that leaves what is dropped dropped: the mask after the drop shows."""
    del key
    return jnp.where(layer.weights == 0, 1.0, 0.0)


@pytest.mark.parametrize("rate", RATES)
def test_taylor(x64, numbers, replace, rate):
    _, masks = replace(rate, drop=agent_optax.taylor, grow=stay_away)
    for layer in LAYERS:
        kept = masks[layer] & before(numbers, layer)
        np.testing.assert_array_equal(kept, numbers[f"death_taylor_r{rate}_{layer}"])


@pytest.mark.parametrize("rate", RATES)
def test_magnitude_by_sign(x64, numbers, replace, rate):
    """Of positive weights the same go; of negative ones the published code drops nearly all, ours half of n."""
    _, masks = replace(rate, drop=agent_optax.magnitude_by_sign, grow=stay_away)
    for layer in LAYERS:
        kept, active, w = masks[layer] & before(numbers, layer), before(numbers, layer), numbers[f"w_{layer}"]
        n = num_replaced(numbers, rate, layer)
        np.testing.assert_array_equal(kept[w > 0], numbers[f"death_set_r{rate}_{layer}"].astype(bool)[w > 0])
        negative = np.sort(w[active & (w < 0)])[::-1]  # from zero down
        np.testing.assert_array_equal(kept[w < 0], w[w < 0] < negative[n // 2 - 1] if n >= 2 else w[w < 0] < 0)
        assert np.sum(active & ~kept) == n


@pytest.mark.parametrize("rate", RATES)
def test_growth_by_momentum(x64, numbers, replace, rate):
    momentum = [jnp.asarray(numbers[f"bufd_{layer}"]) for layer in LAYERS]
    params, masks = replace(rate, average=momentum, grow=agent_optax.momentum_magnitude, momentum=0.9)
    for layer in LAYERS:
        np.testing.assert_array_equal(masks[layer], numbers[f"upd_momentum_mask_r{rate}_{layer}"])
        np.testing.assert_array_equal(params[layer], numbers[f"upd_momentum_w_r{rate}_{layer}"])


@pytest.mark.parametrize("rate", RATES)
def test_growth_of_never_active_positions(x64, numbers, replace, rate):
    """Exactly as many as were dropped, none of which was ever active while there are enough others."""
    rng = np.random.default_rng(0)
    ever = [before(numbers, layer) | (rng.random(before(numbers, layer).shape) < 0.2) for layer in LAYERS]
    _, masks = replace(rate, ever_active=[jnp.asarray(e) for e in ever], grow=agent_optax.never_active)
    for layer in LAYERS:
        kept = numbers[f"death_mag_r{rate}_{layer}"].astype(bool)
        n, fresh = num_replaced(numbers, rate, layer), np.sum(~ever[layer])
        grown = masks[layer] & ~kept
        assert grown.sum() == n and np.sum(grown & ~ever[layer]) == min(n, fresh)
        if np.sum(~before(numbers, layer)) >= n:  # in the published data no inactive position was ever active
            assert numbers["unfired_nnz_after"][rate, layer] == masks[layer].sum()


def test_never_active_positions_are_chosen_evenly(numbers):
    layer = agent_optax.sparsity._topology.Layer(jnp.zeros(40), jnp.zeros(40, bool), jnp.zeros(40), jnp.arange(40) < 20)
    scores = jax.vmap(lambda key: agent_optax.never_active(layer, key))(jax.random.split(jax.random.key(0), 2000))
    assert np.all(scores[:, 20:].min(1) > scores[:, :20].max(1))
    wins = np.bincount(np.asarray(scores).argmax(1), minlength=40)[20:]
    assert np.abs(wins - 100).max() < 5 * np.sqrt(100)
