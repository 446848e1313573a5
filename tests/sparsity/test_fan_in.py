"""Constant fan-in: its number, its choice of weights, ablation, and N:M with fewer than n, against NumPy."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_loop import train

import agent_optax
from agent_optax.sparsity.patterns._columns import Columns
from agent_optax.sparsity.patterns._n_m_groups import NMGroups

PADDED = {"kernel": np.arange(8)[:, None] + np.zeros(6) < 3}  # the first row of blocks of 3 x 4 and 3 x 2


def start_mask(shape: tuple[int, ...], sparsity: float | None, pattern: Any, **options: Any) -> np.ndarray:
    options = {"distribution": agent_optax.uniform, **options}
    tx = agent_optax.sparsify(optax.sgd(0.1), agent_optax.rigl(), sparsity=sparsity, pattern=pattern, **options)
    params = {"kernel": jnp.ones(shape)}
    return np.asarray(agent_optax.active_masks(tx.init(params), params)["kernel"])


@pytest.mark.parametrize(
    ("shape", "sparsity", "group", "fan_in"),
    [((784, 300), 0.99, 1, 8), ((20, 7), 0.9, 3, 2), ((3, 3, 4, 10), 0.75, 4, 9), ((10, 6), 0.99, 2, 1)],
)
@pytest.mark.parametrize("storage", ["dense", "compact"])
def test_every_output_has_the_fan_in_of_the_density(shape, sparsity, group, fan_in, storage) -> None:
    assert fan_in == max(round((1 - sparsity) * math.prod(shape[:-1])), 1)
    matrix = start_mask(shape, sparsity, agent_optax.fan_in(group=group), storage=storage).reshape(-1, shape[-1])
    assert set(matrix.sum(0).tolist()) == {fan_in}
    for first in range(0, shape[-1], group):
        assert np.all(matrix[:, first : first + group] == matrix[:, first : first + 1])
    assert len({tuple(column) for column in matrix.T}) > 1


def test_the_smaller_last_group_is_ranked_by_the_mean_of_its_own() -> None:
    """Of five outputs in groups of 4 the last is alone, and competes with its own magnitude, not with half of it."""
    weights = np.full((3, 5), 0.6, np.float32)
    weights[0, :4], weights[:, 4] = 2.0, [0.9, 0.1, 0.1]
    params = {"kernel": jnp.asarray(weights)}
    masks = agent_optax.magnitude_masks(params, 1 / 2, scope="global", pattern=agent_optax.blocks((1, 4)))
    assert np.asarray(masks["kernel"])[:, 4].tolist() == [True, False, False]
    masks = agent_optax.magnitude_masks(
        params, 2 / 3, scope="layer", distribution=agent_optax.uniform, pattern=agent_optax.fan_in(group=4)
    )
    np.testing.assert_array_equal(masks["kernel"], [[True] * 5, [False] * 5, [False] * 5])


def best_columns(scores: Any, first: Any, first_scores: Any, quota: Any) -> np.ndarray:
    """In NumPy: of each column those of `first` by their scores, then the others by theirs, then by position."""
    mask = np.zeros(scores.shape, bool)
    for column, number in enumerate(quota):
        rank = lambda i, c=column: (not first[i, c], -(first_scores if first[i, c] else scores)[i, c], i)  # noqa: E731
        mask[sorted(range(len(scores)), key=rank)[:number], column] = True
    return mask


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from([None, 0.3, 0.7, 1.0]))
def test_best_of_each_column(data: st.DataObject, ablation: float | None) -> None:
    size, num_columns, fan_in = 6, 4, 2
    draw = lambda values: np.array(data.draw(st.lists(values, min_size=24, max_size=24))).reshape(size, num_columns)  # noqa: E731
    scores, first_scores, first = draw(st.integers(0, 9)), draw(st.integers(0, 9)), draw(st.booleans())
    number = fan_in * num_columns
    mask = Columns(ablation).best(*map(jnp.asarray, (scores, number, first, first_scores)))
    assert ablation is None or abs(int(mask.sum()) - number) <= num_columns // 2
    quota = np.full(num_columns, fan_in)
    if ablation is not None:
        flat = lambda x: x.reshape(-1)  # noqa: E731
        rank = lambda i: (not flat(first)[i], -flat(first_scores if flat(first)[i] else scores)[i], i)  # noqa: E731
        salient = np.zeros(24, bool)
        salient[sorted(range(24), key=rank)[:number]] = True
        num_salient = salient.reshape(size, num_columns).sum(0)
        fewest = -(-number // size)  # columns that hold so many units
        alive = num_salient >= min(max(int(ablation * fan_in), 1), sorted(num_salient)[-fewest])
        quota = np.where(alive, np.clip((number + alive.sum() // 2) // alive.sum(), 1, size), 0)
    np.testing.assert_array_equal(mask, best_columns(scores, first, first_scores, quota))


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(0, 12))
def test_at_most_n_of_m_takes_the_best_that_are_allowed(data: st.DataObject, number: int) -> None:
    n, m = 2, 4
    draw = lambda values: np.array(data.draw(st.lists(values, min_size=24, max_size=24))).reshape(8, 3)  # noqa: E731
    scores, first = draw(st.integers(0, 9)), draw(st.booleans())
    mask = np.asarray(NMGroups(n, m, at_most=True).best(jnp.asarray(scores), number, jnp.asarray(first)))
    expected = np.zeros((8, 3), bool)
    order = sorted(np.ndindex(8, 3), key=lambda i: (not first[i], -scores[i], i))
    room = np.full((2, 3), n)
    for i, j in order:  # greedily: the best allowed set, for groups are a partition
        if expected.sum() < number and room[i // m, j]:
            expected[i, j], room[i // m, j] = True, room[i // m, j] - 1
    np.testing.assert_array_equal(mask, expected)


def test_at_most_n_of_m_at_any_sparsity_above() -> None:
    pattern = agent_optax.n_m(2, 4, at_most=True)
    for topology in (agent_optax.rigl(update_every=1), agent_optax.gradual_pruning(stop=3, update_every=1)):
        tx = agent_optax.sparsify(
            optax.sgd(0.1), topology, sparsity=0.8, distribution=agent_optax.uniform, pattern=pattern
        )
        params = {"kernel": jax.random.normal(jax.random.key(0), (32, 20))}
        gradient = lambda p, step: jax.tree.map(lambda x: jnp.sin(9 * x + step), p)  # noqa: E731
        params, opt_state, _ = train(tx, params, gradient, 4)
        mask = np.asarray(agent_optax.active_masks(opt_state, params)["kernel"])
        assert mask.sum() == 128 and mask.reshape(8, 4, 20).sum(1).max() == 2
    with pytest.raises(ValueError, match=r"kernel is to have the density 0\.6.*allows 0\.5 at most.*uniform"):
        start_mask((32, 20), 0.4, pattern)


def test_ablation_gives_the_weights_of_dead_outputs_to_the_others() -> None:
    """Outputs whose weights and gradients are small lose all; the others share what they had."""
    scale = jnp.asarray([1.0] * 6 + [1e-3] * 6)
    weights = jax.random.normal(jax.random.key(0), (40, 12)) * scale
    tx = agent_optax.sparsify(
        optax.set_to_zero(),
        agent_optax.rigl(update_every=1, drop_fraction=0.5),
        sparsity=0.9,
        pattern=agent_optax.fan_in(ablation=0.5),
    )
    params = {"kernel": weights}
    opt_state = tx.init(params)
    params = agent_optax.mask_params(params, opt_state)
    grads = {"kernel": jax.random.normal(jax.random.key(1), (40, 12)) * scale}
    _, opt_state = tx.update(grads, opt_state, params)
    mask = np.asarray(agent_optax.active_masks(opt_state, params)["kernel"])
    assert mask.sum(0).tolist() == [8] * 6 + [0] * 6


def test_ablation_leaves_outputs_enough_to_hold_all_weights() -> None:
    """All salient weights lie in one output of eight inputs; the twelve that are active need two."""
    scores = jnp.zeros((8, 6)).at[:, 0].set(2.0).at[:4, 3].set(1.0)
    mask = np.asarray(Columns(1.0).best(scores, 12))
    assert mask.sum() == 12 and np.flatnonzero(mask.any(0)).tolist() == [0, 3]


@pytest.mark.parametrize("topology", ["rigl", "set_"])
def test_ablation_keeps_about_the_number_of_weights(topology: str) -> None:
    tx = agent_optax.sparsify(
        optax.sgd(0.3),
        {"rigl": agent_optax.rigl, "set_": agent_optax.set_}[topology](update_every=1),
        sparsity=0.95,
        distribution=agent_optax.uniform,
        pattern=agent_optax.fan_in(ablation=0.9),
    )
    scale = jnp.linspace(0.1, 1, 50)
    params = {"kernel": jax.random.normal(jax.random.key(0), (100, 50)) * scale}
    gradient = lambda p, step: jax.tree.map(lambda x: jnp.sin(9 * x + step) * scale, p)  # noqa: E731
    params, opt_state, _ = train(tx, params, gradient, 20)
    numbers = np.asarray(agent_optax.active_masks(opt_state, params)["kernel"]).sum(0)
    alive = numbers[numbers > 0]
    assert len(set(alive.tolist())) == 1 and 0 < len(alive) < 50
    assert abs(alive.sum() - 250) <= 50


def test_balanced_blocks_of_a_convolution() -> None:
    mask = start_mask((3, 3, 8, 12), 0.75, agent_optax.blocks((2, 3), balanced=True))
    blocks = mask.reshape(3, 3, 4, 2, 4, 3)
    assert np.all(blocks == blocks[:, :, :, :1, :, :1])
    assert np.all(blocks.any((3, 5)).reshape(-1, 4).sum(0) == 9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: agent_optax.fan_in(group=0), "group must be"),
        (lambda: agent_optax.fan_in(ablation=0.0), "None ablates nothing"),
        (lambda: agent_optax.fan_in(ablation=1.5), "ablation"),
        (lambda: agent_optax.n_m(2, 4, axis="heads"), "axis must be 'inputs' or 'outputs', got 'heads'"),
        (lambda: start_mask((8, 6), 0.5, agent_optax.fan_in(ablation=0.3), storage="compact"), "ablation.*'dense'"),
        (lambda: start_mask((8, 6), 0.5, agent_optax.blocks((3, 4)), storage="compact"), "blocks that divide"),
        (
            lambda: start_mask((8, 6), None, agent_optax.blocks((3, 4)), storage="compact", masks=PADDED),
            "blocks that divide",
        ),
        (
            lambda: agent_optax.magnitude_masks(jnp.ones((8, 6)), 0.5, pattern=agent_optax.fan_in()),
            "scope='global' lets the number.*use scope='layer'",
        ),
        (lambda: agent_optax.magnitude_masks(jnp.ones((8, 6))), "needs sparsity="),
    ],
)
def test_errors(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
