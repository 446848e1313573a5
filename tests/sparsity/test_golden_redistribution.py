"""Topology updates of A-RigL that move weights between layers (SNFS), and the budget that they share.

With growth by gradient the published code sets every grown weight to 0, also one that was dropped by the same update;
ours keeps that one's value, as with growth by momentum.
"""

import functools

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import jit

import agent_optax
from agent_optax.sparsity.topologies._redistribution import growth, start_redistribution

LAYERS = (0, 1, 2)
RATES = (0, 1)  # indices; each is that of a step, so that one compiled update of a topology serves both
GROWN_BY = {"snfs": agent_optax.momentum_magnitude, "gradredist": agent_optax.gradient_magnitude}


@pytest.fixture(scope="module")
def numbers(golden):
    return golden("update_rigl")


@pytest.fixture(scope="module")
def replace(numbers):
    """`replace(kind, rate)`: one update at a learning rate of 0 with the given momentum."""

    @functools.cache
    def optimizer(kind):
        topology = agent_optax.drop_and_grow(
            grow=GROWN_BY[kind],
            redistribute=GROWN_BY[kind],
            momentum=0.9,
            update_every=1,
            drop_fraction=lambda step: jnp.asarray(numbers["rates"])[step - 1],
        )
        tx = agent_optax.sparsify(
            optax.set_to_zero(), topology, masks=[numbers[f"mask_{layer}"] for layer in LAYERS], storage="dense"
        )
        return tx.init, jit(tx.update)

    def run(kind, rate):
        init, update = optimizer(kind)
        weights, grads, momentum = (
            [jnp.asarray(numbers[f"{name}_{layer}"]) for layer in LAYERS] for name in ("w", "g", "buf")
        )
        opt_state = init(weights)._replace(topology_step=jnp.asarray(rate, jnp.int32))
        # The average takes this step's gradient in before the update sees it.
        before = [(m - 0.1 * g) / 0.9 for m, g in zip(momentum, grads, strict=True)]
        opt_state = optax.tree.set(opt_state, gradient_momentum=before)
        updates, opt_state = update(grads, opt_state, weights)
        params = optax.apply_updates(weights, updates)
        return params, [np.asarray(m) for m in agent_optax.active_masks(opt_state, params)], opt_state

    return run


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("kind", GROWN_BY)
def test_one_update(x64, numbers, replace, kind, rate):
    params, masks, opt_state = replace(kind, rate)
    before = [numbers[f"mask_{layer}"].astype(bool) for layer in LAYERS]
    for layer in LAYERS:
        after = numbers[f"{kind}_r{rate}_mask_{layer}"].astype(bool)
        np.testing.assert_array_equal(masks[layer], after)
        published = numbers[f"{kind}_r{rate}_w_{layer}"]
        if kind == "gradredist":
            published = np.where(before[layer] & after, numbers[f"w_{layer}"], published)
        np.testing.assert_array_equal(params[layer], published)
    assert [mask.sum() for mask in masks] == numbers[f"{kind}_r{rate}_nnz"].tolist()
    assert optax.tree.get(opt_state, "adjusted_growth") == numbers[f"{kind}_r{rate}_adjusted_growth"]


def test_layers_change_in_size(numbers):
    """The data of `test_one_update` contain the case."""
    sizes = [numbers[f"mask_{layer}"].sum() for layer in LAYERS]
    assert all(numbers[f"{kind}_r0_nnz"].tolist() != sizes for kind in GROWN_BY)


def test_three_updates(x64, numbers):
    """SNFS again and again: what rounding loses is grown at later updates."""
    topology = agent_optax.snfs(update_every=1, drop_fraction=float(numbers["rates"][0]), momentum=0.9)
    tx = agent_optax.sparsify(optax.set_to_zero(), topology, masks=[numbers[f"mask_{layer}"] for layer in LAYERS])
    weights = [jnp.asarray(numbers[f"w_{layer}"]) for layer in LAYERS]
    opt_state, update = tx.init(weights), jit(tx.update)
    zeros = [jnp.zeros_like(w) for w in weights]
    for t, adjusted_growth in enumerate(numbers["seq_adjusted_growth"]):
        weights = [w + numbers[f"seq_dw_{layer}"][t] for layer, w in enumerate(weights)]
        weights = agent_optax.mask_params(weights, opt_state)
        momentum = [jnp.asarray(numbers[f"seq_buf_{layer}"][t]) for layer in LAYERS]
        opt_state = optax.tree.set(opt_state, gradient_momentum=momentum)
        updates, opt_state = update(zeros, opt_state, weights)
        weights = optax.apply_updates(weights, updates)
        for layer, mask in enumerate(agent_optax.active_masks(opt_state, weights)):
            np.testing.assert_array_equal(mask, numbers[f"seq_mask_{layer}"][t])
        np.testing.assert_allclose(optax.tree.get(opt_state, "adjusted_growth"), adjusted_growth, rtol=1e-12)


@pytest.mark.parametrize("rate", RATES)
def test_what_is_not_regrown_is_owed(x64, numbers, rate):
    """The published run that grows nothing: ours always grows, but counts what is missing in the same way."""
    baseline = sum(int(numbers[f"mask_{layer}"].sum()) for layer in LAYERS)
    state = start_redistribution(jnp.asarray(baseline), jnp.float64)
    state = state.after(jnp.asarray(numbers[f"prunegrownone_r{rate}_nnz"].sum()))
    assert state.adjusted_growth == numbers[f"prunegrownone_r{rate}_adjusted_growth"] > 0


def test_budget(x64, golden):
    """Shares of the regrowth, with full layers whose overflow is spread."""
    cases = golden("redistribute_rigl")
    for v, zeros, removed, adjusted_growth, regrow in zip(
        *(cases[name] for name in ("v", "zeros", "removed", "adjusted_growth", "regrow")), strict=True
    ):
        ours = growth(jnp.asarray(v), jnp.asarray(removed.sum() + adjusted_growth), jnp.asarray(zeros + removed))
        np.testing.assert_allclose(ours, regrow, rtol=1e-12)
    assert cases["capped"].any()
