"""Gradual pruning by any score, on any polynomial, is what a plain loop of NumPy does."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import jit

import agent_optax

SHAPES = {"first": (20, 12), "second": (12, 10)}
NUM_STEPS, UPDATE_EVERY, STOP, FINAL, RATE, DECAY = 9, 2, 8, 0.75, 0.1, 0.9
RNG = np.random.default_rng(0)
START = {name: RNG.normal(size=shape) * scale for (name, shape), scale in zip(SHAPES.items(), (1, 0.1), strict=True)}
GRADS = [{name: RNG.normal(size=shape) for name, shape in SHAPES.items()} for _ in range(NUM_STEPS)]

# Of weights after the step, the gradient of the step, the sum of -w g and the mean of g^2.
SCORES: dict[str, tuple[Any, Any]] = {
    "magnitude": (agent_optax.weight_magnitude, lambda w, g, moved, mean_square: np.abs(w)),
    "saliency": (agent_optax.taylor, lambda w, g, moved, mean_square: np.abs(w * g)),
    "movement": (agent_optax.movement(), lambda w, g, moved, mean_square: moved),
    "fisher": (agent_optax.fisher(DECAY), lambda w, g, moved, mean_square: 0.5 * w**2 * mean_square),
}


def in_numpy(score: Any, is_global: bool, is_normalized: bool, power: float, start: int) -> Any:
    """Weights and masks after each step of SGD."""
    weights = {name: w.copy() for name, w in START.items()}
    masks = {name: np.ones_like(w, bool) for name, w in START.items()}
    moved, mean_square = ({name: np.zeros_like(w) for name, w in START.items()} for _ in range(2))
    for step, grads in enumerate(GRADS, start=1):
        for name, g in grads.items():
            moved[name] = np.where(masks[name], moved[name] - weights[name] * g, 0)
            mean_square[name] = DECAY * mean_square[name] + (1 - DECAY) * g**2
            weights[name] = np.where(masks[name], weights[name] - RATE * g, 0)
        if (step >= start and (step - start) % UPDATE_EVERY == 0 and step < STOP) or step == STOP:
            share = 1 if step == STOP else 1 - (1 - (step - start) / (STOP - start)) ** power
            scores = {n: score(weights[n], grads[n], moved[n], mean_square[n]) for n in SHAPES}
            if is_normalized:
                scores = {n: s / np.linalg.norm(s[masks[n]]) for n, s in scores.items()}
            scores = {n: np.where(masks[n], s, -np.inf) for n, s in scores.items()}
            keep = {n: int(np.ceil(round((1 - FINAL * share) * s.size, 9))) for n, s in scores.items()}
            pooled = np.sort(np.concatenate([s.ravel() for s in scores.values()]))[::-1]
            for n, s in scores.items():
                least = pooled[sum(keep.values()) - 1] if is_global else np.sort(s.ravel())[::-1][keep[n] - 1]
                masks[n] = s >= least
                weights[n] = np.where(masks[n], weights[n], 0)
        yield weights, masks


@pytest.mark.parametrize(
    ("name", "scope", "is_normalized", "power", "start"),
    [
        ("saliency", "layer", False, 3.0, 2),
        ("movement", "layer", False, 1.0, 2),
        ("fisher", "layer", False, 3.0, STOP),  # at once
        ("magnitude", "global", True, 3.0, 2),
        ("saliency", "global", False, 2.0, 4),
        ("movement", "global", True, 3.0, 2),
    ],
)
def test_gradual_pruning(x64, name, scope, is_normalized, power, start):
    score, plain = SCORES[name]
    topology = agent_optax.gradual_pruning(
        STOP,
        UPDATE_EVERY,
        start,
        scope=scope,
        score=agent_optax.normalized(score) if is_normalized else score,
        power=power,
    )
    tx = agent_optax.sparsify(optax.sgd(RATE), topology, sparsity=FINAL, distribution=agent_optax.uniform)
    params = jax.tree.map(jnp.asarray, START)
    opt_state, update = tx.init(params), jit(tx.update)
    for step, (weights, masks) in enumerate(in_numpy(plain, scope == "global", is_normalized, power, start)):
        updates, opt_state = update(GRADS[step], opt_state, params)
        params = optax.apply_updates(params, updates)
        for leaf in SHAPES:
            np.testing.assert_allclose(params[leaf], weights[leaf], rtol=1e-12, atol=1e-14)
            np.testing.assert_array_equal(agent_optax.active_masks(opt_state, params)[leaf], masks[leaf])
    assert sum(mask.sum() for mask in masks.values()) == 90
    assert opt_state.num_topology_updates == len(range(start, STOP, UPDATE_EVERY)) + 1


def test_random_pruning_keeps_any_weight_alike():
    """What is left of 2,400 weights does not depend on their size."""
    topology = agent_optax.gradual_pruning(4, 1, 1, score=agent_optax.at_random)
    tx = agent_optax.sparsify(optax.sgd(0.0), topology, sparsity=0.5)
    params = {"kernel": jnp.linspace(0.1, 1.0, 2400).reshape(60, 40)}
    opt_state, update = tx.init(params), jit(tx.update)
    for _ in range(4):
        updates, opt_state = update(params, opt_state, params)
        params = optax.apply_updates(params, updates)
    kept = np.flatnonzero(np.ravel(params["kernel"]))
    assert kept.size == 1200
    # The mean position of 1200 of 2400 drawn without replacement: its standard error, by five.
    assert abs(kept.mean() - 2399 / 2) < 5 * np.sqrt(2401 * (2400 - 1200) / (12 * 1200))


def test_a_spoilt_step_is_left_out_and_a_grown_weight_starts_anew():
    topology = agent_optax.drop_and_grow(drop=agent_optax.movement(), update_every=2, drop_fraction=0.5)
    tx = agent_optax.sparsify(optax.sgd(0.1), topology, sparsity=0.5)
    params = {"kernel": jnp.asarray(START["first"], jnp.float32)}
    opt_state, update = tx.init(params), jit(tx.update)
    params = agent_optax.mask_params(params, opt_state)
    grads = [{"kernel": jnp.asarray(g["first"], jnp.float32)} for g in GRADS[:4]]
    grads[2]["kernel"] = grads[2]["kernel"].at[0, 0].set(jnp.nan)
    masks = [np.asarray(params["kernel"] != 0)]
    for g in grads[:3]:
        updates, opt_state = update(g, opt_state, params)
        params = optax.apply_updates(params, updates) if np.isfinite(g["kernel"]).all() else params
        masks.append(np.asarray(agent_optax.active_masks(opt_state, params)["kernel"]))
    moved = np.asarray(opt_state.topology_state.drop_statistics["kernel"])
    assert np.all(np.isfinite(moved)) and np.any(moved[masks[0]] != 0)
    dropped, grown = masks[0] & ~masks[2], masks[2] & ~masks[0]
    assert dropped.sum() == grown.sum() > 0
    assert np.all(moved[dropped] != 0)  # as of step 2: step 3 is left out
    assert np.all(moved[grown] == 0)
    updates, opt_state = update(grads[3], opt_state, params)
    now = np.asarray(opt_state.topology_state.drop_statistics["kernel"])
    assert np.all(now[np.asarray(params["kernel"]) == 0] == 0)


def test_statistics_of_blocks_are_means():
    """Blocks whose weights have moved apart cancel: of signed scores the mean decides, not the size."""
    topology = agent_optax.gradual_pruning(1, start=1, score=agent_optax.movement())
    tx = agent_optax.sparsify(optax.sgd(0.0), topology, sparsity=0.5, pattern=agent_optax.blocks((2, 3)))
    params = {"kernel": jnp.asarray(RNG.normal(size=(4, 7)), jnp.float32)}
    grads = {"kernel": jnp.asarray(RNG.normal(size=(4, 7)), jnp.float32)}
    _, opt_state = tx.update(grads, tx.init(params), params)
    moved = -np.asarray(params["kernel"] * grads["kernel"])
    blocks = [(slice(i, i + 2), slice(j, j + 3)) for i in (0, 2) for j in (0, 3, 6)]  # the last of a row has one column
    best = sorted(blocks, key=lambda block: -moved[block].mean())[:3]
    expected = np.zeros((4, 7), bool)
    for block in best:
        expected[block] = True
    np.testing.assert_array_equal(agent_optax.active_masks(opt_state, params)["kernel"], expected)
