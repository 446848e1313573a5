"""Scores of a network, and the masks of the largest, are those of plain NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import jit

import agent_optax

RNG = np.random.default_rng(0)
PARAMS = {
    "in": {"kernel": RNG.normal(size=(6, 8)), "bias": RNG.normal(size=8)},
    "out": {"kernel": RNG.normal(size=(8, 4))},
}
BATCH = RNG.normal(size=(5, 6)), RNG.normal(size=(5, 4))


def network(params: Any, x: Any) -> Any:
    return jax.nn.relu(x @ params["in"]["kernel"] + params["in"]["bias"]) @ params["out"]["kernel"]


def loss(params: Any, batch: Any) -> Any:
    return jnp.mean((network(params, batch[0]) - batch[1]) ** 2)


def gradient(kernels: list[np.ndarray]) -> list[np.ndarray]:
    """Of `loss` with respect to both kernels, by hand."""
    x, target = BATCH
    before = x @ kernels[0] + PARAMS["in"]["bias"]
    hidden = np.maximum(before, 0)
    error = 2 * (hidden @ kernels[1] - target) / target.size
    return [x.T @ ((error @ kernels[1].T) * (before > 0)), hidden.T @ error]


def kernels_of(tree: Any) -> list[np.ndarray]:
    return [np.asarray(tree[name]["kernel"]) for name in ("in", "out")]


def largest(scores: list[np.ndarray], number: int) -> list[np.ndarray]:
    """The masks of the largest of all, by a sort."""
    flat = np.concatenate([s.ravel() for s in scores])
    mask = np.zeros(flat.size, bool)
    mask[np.argsort(-flat)[:number]] = True
    parts = np.split(mask, np.cumsum([s.size for s in scores])[:-1])
    return [part.reshape(s.shape) for part, s in zip(parts, scores, strict=True)]


def assert_masks(masks: Any, expected: list[np.ndarray]) -> None:
    for mask, own in zip(kernels_of(masks), expected, strict=True):
        np.testing.assert_array_equal(mask, own)
    assert masks["in"]["bias"] is None


def test_snip(x64):
    kernels = kernels_of(PARAMS)
    scores = [np.abs(w * g) for w, g in zip(kernels, gradient(kernels), strict=True)]
    score = agent_optax.snip(loss, BATCH)

    @jit
    def found(params: Any) -> Any:
        by_layer = agent_optax.score_masks(score, params, 0.75, scope="layer", distribution=agent_optax.uniform)
        in_blocks = agent_optax.score_masks(score, params, 0.5, pattern=agent_optax.blocks((2, 4)))
        return score(params), agent_optax.score_masks(score, params, 0.75), by_layer, in_blocks

    own_scores, of_all, by_layer, in_blocks = found(PARAMS)
    for mine, own in zip(kernels_of(own_scores), scores, strict=True):
        np.testing.assert_allclose(mine, own, rtol=1e-10)
    assert_masks(of_all, largest(scores, 20))
    assert_masks(by_layer, [largest([s], s.size // 4)[0] for s in scores])
    means = [s.reshape(s.shape[0] // 2, 2, s.shape[1] // 4, 4).mean((1, 3)) for s in scores]
    assert_masks(in_blocks, [np.kron(mask, np.ones((2, 4), bool)) for mask in largest(means, 5)])


def test_grasp(x64):
    """The product with the Hessian is that of finite differences."""
    kernels, step = kernels_of(PARAMS), 1e-5
    g = gradient(kernels)
    ahead, behind = (gradient([w + e * d for w, d in zip(kernels, g, strict=True)]) for e in (step, -step))
    scores = [w * (a - b) / (2 * step) for w, a, b in zip(kernels, ahead, behind, strict=True)]
    score = agent_optax.grasp(loss, BATCH)
    for mine, own in zip(kernels_of(score(PARAMS)), scores, strict=True):
        np.testing.assert_allclose(mine, own, rtol=1e-5, atol=1e-8)
    assert min(s.min() for s in scores) < 0
    assert_masks(agent_optax.score_masks(score, PARAMS, 0.5), largest(scores, 40))
    # Blocks of scores that cancel rank by their sum, not by their size.
    sums = [s.reshape(s.shape[0] // 2, 2, s.shape[1] // 4, 4).sum((1, 3)) for s in scores]
    masks = agent_optax.score_masks(score, PARAMS, 0.5, pattern=agent_optax.blocks((2, 4)))
    assert_masks(masks, [np.kron(mask, np.ones((2, 4), bool)) for mask in largest(sums, 5)])


def synflow(kernels: list[np.ndarray]) -> list[np.ndarray]:
    """For two layers, each bias an input of one, all hidden units active."""
    first, second = map(np.abs, kernels)
    hidden = first.sum(0) + np.abs(PARAMS["in"]["bias"])
    return [first * second.sum(1), second * hidden[:, None]]


def test_synflow_in_rounds(x64):
    kernels, rounds = kernels_of(PARAMS), 10
    masks = [np.ones_like(w, bool) for w in kernels]
    for k in range(1, rounds + 1):
        scores = synflow([w * m for w, m in zip(kernels, masks, strict=True)])
        scores = [np.where(m, s, -1) for s, m in zip(scores, masks, strict=True)]
        masks = largest(scores, int(80 * 0.1 ** (k / rounds) + 1e-9))
    score = agent_optax.synflow(network, BATCH[0][:1])
    for mine, own in zip(kernels_of(score(PARAMS)), synflow(kernels), strict=True):
        np.testing.assert_allclose(mine, own, rtol=1e-10)
    found = jit(lambda params: agent_optax.score_masks(score, params, 0.9, rounds=rounds))(PARAMS)
    assert_masks(found, masks)
    assert sum(mask.sum() for mask in masks) == 8
    at_once = agent_optax.score_masks(score, PARAMS, 0.9)
    assert agent_optax.mask_overlap(found, at_once) < 1


@pytest.mark.parametrize("pattern", [agent_optax.n_m(2, 4), agent_optax.fan_in(), None], ids=["2:4", "fan-in", "none"])
def test_rounds_end_with_the_pattern(pattern):
    """By magnitude, which no round changes, as at once: the best of each group are safe."""
    params = {"kernel": jnp.asarray(RNG.normal(size=(8, 4)), jnp.float32)}
    magnitude = lambda params: jax.tree.map(jnp.abs, params)  # noqa: E731
    options = {"scope": "layer", "distribution": agent_optax.uniform, "pattern": pattern}
    in_rounds = agent_optax.score_masks(magnitude, params, 0.5, rounds=4, **options)
    np.testing.assert_array_equal(in_rounds["kernel"], agent_optax.magnitude_masks(params, 0.5, **options)["kernel"])


# The leaf, its axes, and how its activations meet it: as an equation of numpy.einsum.
WANDA = {
    "dense": ((8, 6), (10, 8), None, "ni->i"),
    "conv": ((3, 3, 8, 6), (2, 5, 5, 8), None, "nhwi->i"),
    "attention": ((4, 2, 6), (10, 4, 2), agent_optax.Axes(inputs=(0, 1), outputs=2), "nij->ij"),
    "stack": ((8, 3, 6), (3, 10, 8), agent_optax.Axes(inputs=0, stack=1, outputs=2), "sni->is"),
}


@pytest.mark.parametrize("kind", WANDA)
def test_wanda(kind):
    """Half the inputs of each output, or two of four; a column has what feeds one output."""
    shape, of_inputs, own_axes, equation = WANDA[kind]
    weights, x = RNG.normal(size=shape).astype(np.float32), RNG.normal(size=of_inputs).astype(np.float32)
    axes = lambda name, shape: own_axes  # noqa: E731
    norms = np.sqrt(np.einsum(equation, x**2))
    if kind == "conv":
        norms = norms[None, None]
    expected = np.abs(weights) * norms[..., None]
    score = agent_optax.wanda({"kernel": x}, axes)
    params = {"kernel": jnp.asarray(weights)}
    np.testing.assert_allclose(score(params)["kernel"], expected, rtol=1e-5)
    if kind == "dense":  # norms do as well as activations
        np.testing.assert_array_equal(
            agent_optax.wanda({"kernel": norms}, axes)(params)["kernel"], score(params)["kernel"]
        )

    def in_columns(array: np.ndarray) -> np.ndarray:
        if kind == "stack":
            return array.reshape(8, 18)  # [inputs, layers and outputs]
        return array.reshape(-1, 6)

    options = {"scope": "layer", "distribution": agent_optax.uniform, "axes": axes}
    columns = in_columns(expected)
    half = np.argsort(np.argsort(-columns, axis=0), axis=0) < columns.shape[0] // 2
    masks = agent_optax.score_masks(score, params, 0.5, pattern=agent_optax.fan_in(), **options)
    np.testing.assert_array_equal(in_columns(np.asarray(masks["kernel"])), half)
    groups = columns.reshape(-1, 4, columns.shape[1])
    two = (np.argsort(np.argsort(-groups, axis=1), axis=1) < 2).reshape(columns.shape)
    masks = agent_optax.score_masks(score, params, pattern=agent_optax.n_m(2, 4), **options)
    np.testing.assert_array_equal(in_columns(np.asarray(masks["kernel"])), two)


def test_masks_of_and_overlap():
    a, b = (RNG.random((7, 5)) < 0.4 for _ in range(2))
    found = agent_optax.masks_of({"kernel": jnp.where(a, 2.0, 0.0), "bias": jnp.zeros(5)})
    np.testing.assert_array_equal(found["kernel"], a)
    assert found["bias"] is None
    overlap = float(agent_optax.mask_overlap(found, {"kernel": b, "bias": None}))
    assert overlap == pytest.approx(np.sum(a & b) / np.sum(a | b))
    assert agent_optax.mask_overlap({"kernel": a & False}, {"kernel": b & False}) == 1
    # The docstring's other two numbers, for masks of equal size.
    c, d = (np.isin(np.arange(30), RNG.choice(30, 12, replace=False)) for _ in range(2))
    j = float(agent_optax.mask_overlap(c, d))
    assert np.sum(c & d) == pytest.approx(2 * j / (1 + j) * 12)
    assert np.sum(c != d) == pytest.approx(2 * (1 - j) / (1 + j) * 12)


def test_scores_of_half_precision_do_not_vanish() -> None:
    """The product of a small weight and a small gradient is zero in float16."""
    kernel = (0.05 * jax.random.normal(jax.random.key(0), (32, 16))).astype(jnp.float16)
    x = jax.random.normal(jax.random.key(1), (8, 32), jnp.float16)

    def loss_fn(params: Any, batch: jax.Array) -> jax.Array:
        return jnp.mean((batch @ params) ** 2) * jnp.float16(1e-3)

    mask = agent_optax.score_masks(agent_optax.snip(loss_fn, x), kernel, sparsity=0.5)
    scores = np.abs(np.asarray(kernel, np.float32) * np.asarray(jax.grad(loss_fn)(kernel, x), np.float32))
    np.testing.assert_array_equal(mask, scores > np.median(scores))
