"""One topology update of A-RigL without redistribution.

Here the published code sets *every* grown weight to 0, also one that was dropped by the same update; ours keeps that
one's value, as A-ITOP does.
"""

import functools

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import jit

import agent_optax

LAYERS = (0, 1, 2)
RATES = (0, 1)  # indices; each is that of a step, so that one compiled update of a topology serves both


@pytest.fixture(scope="module")
def numbers(golden):
    return golden("update_rigl")


@pytest.fixture(scope="module")
def replace(numbers):
    """`replace(topology, rate)`: one update at a learning rate of 0 with momentum that no step changes."""

    @functools.cache
    def optimizer(make_topology):
        topology = make_topology(update_every=1, drop_fraction=lambda step: jnp.asarray(numbers["rates"])[step - 1])
        still = optax.chain(optax.set_to_zero(), optax.trace(decay=1.0), optax.set_to_zero())
        tx = agent_optax.sparsify(still, topology, masks=[numbers[f"mask_{layer}"] for layer in LAYERS])
        return tx.init, jit(tx.update)

    def run(make_topology, rate):
        init, update = optimizer(make_topology)
        weights, grads, momentum = (
            [jnp.asarray(numbers[f"{name}_{layer}"]) for layer in LAYERS] for name in ("w", "g", "buf")
        )
        opt_state = init(weights)._replace(topology_step=jnp.asarray(rate, jnp.int32))
        opt_state = optax.tree.set(opt_state, trace=momentum)
        updates, opt_state = update(grads, opt_state, weights)
        params = optax.apply_updates(weights, updates)
        masks = [np.asarray(mask) for mask in agent_optax.active_masks(opt_state, params)]
        return params, masks, optax.tree.get(opt_state, "trace")

    return run


@pytest.mark.parametrize("rate", RATES)
def test_rigl(x64, numbers, replace, rate):
    params, masks, momentum = replace(agent_optax.rigl, rate)
    for layer in LAYERS:
        before, after = numbers[f"mask_{layer}"].astype(bool), numbers[f"rigl_r{rate}_mask_{layer}"].astype(bool)
        np.testing.assert_array_equal(masks[layer], after)
        assert masks[layer].sum() == numbers[f"rigl_r{rate}_nnz"][layer]

        published = numbers[f"rigl_r{rate}_w_{layer}"]
        back_at_once = before & after & (published == 0)
        np.testing.assert_array_equal(params[layer], np.where(back_at_once, numbers[f"w_{layer}"], published))

        # The published update only multiplies momentum by the mask. In training it is then 0 where a weight grows, and
        # so is ours; but the buffer given here is dense.
        np.testing.assert_array_equal(
            np.where(after, momentum[layer], 0), np.where(before, numbers[f"rigl_r{rate}_buf_{layer}"], 0)
        )


def test_some_weights_are_dropped_and_grown_at_once(numbers):
    """The data of `test_rigl` contain the case in which the rules differ, and no other active weight is 0."""
    num_back = 0
    for rate in RATES:
        for layer in LAYERS:
            before = numbers[f"mask_{layer}"].astype(bool)
            assert np.all(numbers[f"w_{layer}"][before] != 0)
            back = (
                before & numbers[f"rigl_r{rate}_mask_{layer}"].astype(bool) & (numbers[f"rigl_r{rate}_w_{layer}"] == 0)
            )
            num_back += back.sum()
    assert num_back > 0


@pytest.mark.parametrize("rate", RATES)
def test_set_replaces_as_many_as_published(x64, numbers, replace, rate):
    """The published code regrows by coin tosses, whose chance is the number removed over that of the free positions."""
    params, masks, _ = replace(agent_optax.set_, rate)
    for layer in LAYERS:
        before, num_removed = numbers[f"mask_{layer}"].astype(bool), numbers[f"set_r{rate}_n_removed"][layer]
        magnitude = np.where(before, np.abs(numbers[f"w_{layer}"]), 0)
        kept = magnitude >= np.sort(magnitude[before])[num_removed]  # all but the num_removed smallest
        np.testing.assert_allclose(num_removed / np.sum(~kept), numbers[f"set_r{rate}_prob"][layer], rtol=1e-12)
        assert np.all(masks[layer][kept]) and np.sum(masks[layer] & ~kept) == num_removed
        assert not np.any(np.asarray(params[layer])[masks[layer] & ~before])
