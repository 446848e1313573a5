"""One topology update of A-ITOP, layer by layer: what is dropped, what is grown, what becomes of weights and momentum.

Only where an active weight is exactly 0 do the rules differ: the published code keeps |w| > threshold, so that all
active zeros go, however few weights the rate asks for; ours are exactly ceil(rate * active).
"""

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


def layers(numbers, name):
    return [jnp.asarray(numbers[f"{name}_{layer}"]) for layer in LAYERS]


def frozen(make_topology, numbers):
    """Moves no weight, carries a momentum buffer that no step changes, and replaces rates[t] in step t + 1."""
    topology = make_topology(update_every=1, drop_fraction=lambda step: jnp.asarray(numbers["rates"])[step - 1])
    still = optax.chain(optax.set_to_zero(), optax.trace(decay=1.0), optax.set_to_zero())
    return agent_optax.sparsify(still, topology, masks=[numbers[f"mask_{layer}"] for layer in LAYERS])


@pytest.fixture(scope="module")
def replace(numbers):
    """`replace(rate, weights, grads, buffers)`: one update by magnitude and gradient at a learning rate of 0."""
    tx = frozen(agent_optax.rigl, numbers)
    update = jit(tx.update)

    def run(rate, weights, grads, buffers):
        opt_state = tx.init(weights)._replace(topology_step=jnp.asarray(rate, jnp.int32))
        opt_state = optax.tree.set(opt_state, trace=buffers)
        updates, opt_state = update(grads, opt_state, weights)
        params = optax.apply_updates(weights, updates)
        # Ours leaves the momentum of inactive weights alone; it is reset when they grow.
        momentum = agent_optax.mask_params(optax.tree.get(opt_state, "trace"), opt_state)
        masks = [np.asarray(mask) for mask in agent_optax.active_masks(opt_state, params)]
        return params, masks, momentum, agent_optax.diagnostics(opt_state)

    return run


def num_replaced(numbers, rate):
    return [int(np.ceil(numbers["rates"][rate] * numbers[f"mask_{layer}"].sum())) for layer in LAYERS]


@pytest.mark.parametrize("rate", RATES)
def test_magnitude_drop(x64, numbers, replace, rate):
    """With gradients only where nothing was active the dropped weights stay away: the mask after the drop shows."""
    grads = [jnp.asarray(1.0 - numbers[f"mask_{layer}"]) for layer in LAYERS]
    _, masks, _, report = replace(rate, layers(numbers, "w"), grads, layers(numbers, "buf"))
    for layer in LAYERS:
        kept = masks[layer] & numbers[f"mask_{layer}"].astype(bool)
        np.testing.assert_array_equal(kept, numbers[f"death_mag_r{rate}_{layer}"])
    assert report["num_dropped"] == report["num_grown"] == sum(num_replaced(numbers, rate))


@pytest.mark.parametrize("rate", RATES)
def test_gradient_growth(x64, numbers, replace, rate):
    """Masks, weights and momentum; a weight dropped and grown at once keeps its value and its momentum."""
    params, masks, momentum, _ = replace(rate, *(layers(numbers, name) for name in ("w", "g", "buf")))
    for layer in LAYERS:
        np.testing.assert_array_equal(masks[layer], numbers[f"upd_gradient_mask_r{rate}_{layer}"])
        np.testing.assert_array_equal(params[layer], numbers[f"upd_gradient_w_r{rate}_{layer}"])
        np.testing.assert_array_equal(momentum[layer], numbers[f"upd_gradient_buf_r{rate}_{layer}"])
        assert masks[layer].sum() == numbers[f"mask_{layer}"].sum()


def test_some_weights_are_dropped_and_grown_at_once(numbers):
    """The data of `test_gradient_growth` contain the case."""
    num_back = 0
    for rate in RATES:
        for layer in LAYERS:
            dropped = numbers[f"mask_{layer}"] > numbers[f"death_mag_r{rate}_{layer}"]
            back = dropped & numbers[f"upd_gradient_mask_r{rate}_{layer}"].astype(bool)
            assert np.all(numbers[f"upd_gradient_w_r{rate}_{layer}"][back] == numbers[f"w_{layer}"][back])
            num_back += back.sum()
    assert num_back > 0


@pytest.mark.parametrize("rate", RATES[:3])
def test_active_zeros_go_first(x64, numbers, replace, rate):
    """Two active weights of each layer are exactly 0, and two or more are dropped: the rules agree."""
    assert min(num_replaced(numbers, rate)) >= 2
    grads = [jnp.asarray(1.0 - numbers[f"mask_{layer}"]) for layer in LAYERS]
    _, away, _, _ = replace(rate, layers(numbers, "wz"), grads, layers(numbers, "buf"))
    params, masks, momentum, _ = replace(rate, *(layers(numbers, name) for name in ("wz", "g", "buf")))
    for layer in LAYERS:
        kept = away[layer] & numbers[f"mask_{layer}"].astype(bool)
        np.testing.assert_array_equal(kept, numbers[f"deathz_mag_r{rate}_{layer}"])
        np.testing.assert_array_equal(masks[layer], numbers[f"updz_gradient_mask_r{rate}_{layer}"])
        np.testing.assert_array_equal(params[layer], numbers[f"updz_gradient_w_r{rate}_{layer}"])
        np.testing.assert_array_equal(momentum[layer], numbers[f"updz_gradient_buf_r{rate}_{layer}"])


def test_active_zeros_beyond_the_rate_stay(x64, numbers, replace):
    """The rules differ: one weight is to go and two are 0. The published code drops both, ours one of them."""
    rate = 3
    assert num_replaced(numbers, rate) == [1, 1, 1]
    grads = [jnp.asarray(1.0 - numbers[f"mask_{layer}"]) for layer in LAYERS]
    _, masks, _, report = replace(rate, layers(numbers, "wz"), grads, layers(numbers, "buf"))
    assert report["num_dropped"] == 3
    for layer in LAYERS:
        before = numbers[f"mask_{layer}"].astype(bool)
        dropped, published = before & ~masks[layer], before & ~numbers[f"deathz_mag_r{rate}_{layer}"].astype(bool)
        assert dropped.sum() == 1 and published.sum() == 2 and np.all(published[dropped])
        assert not np.any(numbers[f"wz_{layer}"][published])


def test_random_growth(x64, numbers):
    """The published code tosses a coin for each inactive position; ours grows exactly the expected number.

    A position's chance is the same: over many keys each is grown as often as the published probability says.
    """
    tx = frozen(agent_optax.set_, numbers)
    weights, grads = layers(numbers, "w"), layers(numbers, "g")
    opt_state = tx.init(weights)
    num_keys = 1000
    keys = jax.random.bits(jax.random.key(7), (num_keys, *opt_state.topology_key.shape), jnp.uint32)

    @jit
    def draw(rate):
        def masks(key):
            start = opt_state._replace(topology_step=rate, topology_key=key)
            return agent_optax.active_masks(tx.update(grads, start, weights)[1], weights)

        return jax.vmap(masks)(keys)

    for rate in RATES:
        for layer, drawn in enumerate(draw(jnp.asarray(rate, jnp.int32))):
            drawn, kept = np.asarray(drawn), numbers[f"death_mag_r{rate}_{layer}"].astype(bool)
            free = drawn[:, ~kept]
            assert np.all(drawn[:, kept]) and np.all(free.sum(1) == numbers["rand_n_removed"][rate, layer])
            assert free.shape[1] == numbers["rand_n_inactive"][rate, layer]
            chance = numbers["rand_prob"][rate, layer]
            deviation = (free.mean(0) - chance) / np.sqrt(chance * (1 - chance) / num_keys)
            # 1100 positions in all: 5 standard deviations and a little for the skew of rare events; their mean square
            # is 1 with a standard deviation of about sqrt(2 / n).
            assert np.abs(deviation).max() < 6
            assert np.mean(deviation**2) < 1 + 4 * np.sqrt(2 / free.shape[1])
