"""A leaf is layers of inputs and outputs, whatever its axes: each is treated as if it were a leaf of its own."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_loop import train

import agent_optax
from agent_optax import Axes, export
from agent_optax.sparsity._default_axes import axes_of_leaves
from agent_optax.sparsity._leaf_names import leaf_names

both_storages = pytest.mark.parametrize("storage", ["dense", "compact"])


def default_axes(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[Axes, bool]]:
    found = axes_of_leaves(None, list(shapes), list(shapes.values()), range(len(shapes)))
    return dict(zip(shapes, map(tuple, found), strict=True))


def axes_by_name(params: Any) -> dict[str, tuple[Axes, bool]]:
    shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
    return default_axes(dict(zip(leaf_names(params), shapes, strict=True)))


def known(**roles: Any) -> tuple[Axes, bool]:
    return Axes(**roles), True


# The arithmetic.


@st.composite
def leaves(draw: st.DrawFn) -> tuple[tuple[int, ...], Axes]:
    rank = draw(st.integers(2, 5))
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=rank, max_size=rank)))
    order = draw(st.permutations(range(rank)))
    cuts = sorted(draw(st.lists(st.integers(0, rank), min_size=3, max_size=3)))
    roles = [order[a:b] for a, b in zip([0, *cuts], [*cuts, rank], strict=True)]
    return shape, Axes(*(tuple(axis - rank * draw(st.booleans()) for axis in role) for role in roles))


@settings(max_examples=40, deadline=None)
@given(leaves())
def test_layers_and_back(drawn: tuple[tuple[int, ...], Axes]) -> None:
    shape, axes = drawn
    axes = axes.of_leaf("leaf", shape)
    x = np.arange(math.prod(shape)).reshape(shape)
    order = (*axes.stack, *axes.spatial, *axes.inputs, *axes.outputs)
    number = axes.num_layers(shape)
    expected = x.transpose(order).reshape(number, *axes.layer_shape(shape))
    layers = np.asarray(axes.as_layers(jnp.asarray(x)))
    np.testing.assert_array_equal(layers.reshape(expected.shape), expected)
    np.testing.assert_array_equal(axes.as_leaf(jnp.asarray(layers), jnp.asarray(x)), x)
    unstacked = axes.unstacked(jnp.asarray(x))
    np.testing.assert_array_equal(np.stack(unstacked), expected)
    np.testing.assert_array_equal(axes.restacked(unstacked, jnp.asarray(x)), x)


# The same layer in other axes gets the same mask, and is trained to the same numbers.

STACK, INPUTS, OUTPUTS = 3, 8, 12
FORMS = {  # from [stack, inputs, outputs]
    "outputs split and first": ((STACK, INPUTS, 3, 4), (2, 3, 0, 1), Axes(outputs=(0, 1), stack=2, inputs=3)),
    "inputs split, stack last": ((STACK, 2, 4, OUTPUTS), (1, 2, 3, 0), Axes(inputs=(0, 1), outputs=2, stack=3)),
}
TOPOLOGIES = {
    "set_": agent_optax.set_(update_every=2),
    "rigl": agent_optax.rigl(update_every=2),
    "snfs": agent_optax.snfs(update_every=2),
    "gradual_pruning": agent_optax.gradual_pruning(stop=4, update_every=2),
    "granet": agent_optax.gradual_pruning(stop=4, update_every=2, drop_fraction=0.3, scope="global"),
}
PATTERNS = {
    "none": None,
    "n_m": agent_optax.n_m(2, 4),
    "n_m along outputs": agent_optax.n_m(1, 4, axis="outputs"),
    "fan_in": agent_optax.fan_in(group=2),
    "blocks": agent_optax.blocks((2, 2)),
}


def stacked_weights() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(2, STACK, INPUTS, OUTPUTS)).astype(np.float32)


def trained(w: np.ndarray, target: np.ndarray, axes: Axes | None, topology: Any, **options: Any) -> tuple[Any, Any]:
    """The mask and the weights after five steps, as arrays of the shape of w."""
    choice = None if axes is None else lambda name, shape: axes
    tx = agent_optax.sparsify(optax.sgd(0.3, momentum=0.9), topology, axes=choice, **options)
    params, opt_state, _ = train(tx, jnp.asarray(w), lambda p, step: jnp.tanh(p - target * (step + 1)), 5)
    return np.asarray(agent_optax.active_masks(opt_state, params)), np.asarray(params)


CASES = [
    ("rigl", "n_m along outputs", "dense"),
    ("snfs", "none", "dense"),
    ("granet", "none", "dense"),
    ("rigl", "fan_in", "compact"),
    ("set_", "blocks", "dense"),
]


@pytest.mark.parametrize(("topology", "pattern", "storage"), CASES)
def test_other_axes_same_numbers(topology: str, pattern: str, storage: str) -> None:
    w, target = stacked_weights()
    options: dict[str, Any] = {"pattern": PATTERNS[pattern], "storage": storage}
    if not (PATTERNS[pattern] and PATTERNS[pattern].density):
        options["sparsity"] = 0.75
    mask, weights = trained(w, target, Axes(0, (), 1, 2), TOPOLOGIES[topology], **options)
    for shape, order, axes in FORMS.values():
        into = lambda x: x.reshape(shape).transpose(order)  # noqa: B023, E731
        own_mask, own_weights = trained(into(w), into(target), axes, TOPOLOGIES[topology], **options)
        np.testing.assert_array_equal(own_mask, into(mask))
        np.testing.assert_allclose(own_weights, into(weights), rtol=1e-5, atol=1e-6)


UNSTACKED_CASES = [  # without set_, which draws other numbers for other leaves
    ("rigl", "none", "compact"),
    ("snfs", "none", "dense"),
    ("gradual_pruning", "n_m", "dense"),
]


@pytest.mark.parametrize(("topology", "pattern", "storage"), UNSTACKED_CASES)
def test_a_stack_is_trained_as_leaves_of_their_own(topology: str, pattern: str, storage: str) -> None:
    w, target = stacked_weights()
    w[1] *= 0.2  # whose weights are small, and not fewer for that
    sparsity = None if PATTERNS[pattern] and PATTERNS[pattern].density else 0.75
    choice = lambda name, shape: Axes(0, (), 1, 2) if len(shape) == 3 else None  # noqa: E731
    own = {"pattern": PATTERNS[pattern], "axes": choice}
    apart = {f"layer_{i}": jnp.asarray(layer) for i, layer in enumerate(w)}
    start = agent_optax.magnitude_masks(jnp.asarray(w), sparsity, scope="layer", where=lambda p: True, **own)
    masks = agent_optax.magnitude_masks(apart, sparsity, scope="layer", **own)
    np.testing.assert_array_equal(start, np.stack(list(masks.values())))
    end = 0.9 if sparsity else None

    def run(params: Any, masks: Any, target: Any) -> Any:
        pruning = {} if "pruning" not in topology and topology != "granet" else {"sparsity": end}
        tx = agent_optax.sparsify(optax.adam(0.1), TOPOLOGIES[topology], masks=masks, storage=storage, **own, **pruning)
        gradient = lambda p, step: jax.tree.map(lambda p, t: jnp.tanh(p - t * (step + 1)), p, target)  # noqa: E731
        params, opt_state, _ = train(tx, params, gradient, 5)
        return agent_optax.active_masks(opt_state, params), params

    mask, weights = run(jnp.asarray(w), start, target)
    own_masks, own_weights = run(apart, masks, {f"layer_{i}": t for i, t in enumerate(target)})
    np.testing.assert_array_equal(mask, np.stack(list(own_masks.values())))
    np.testing.assert_allclose(weights, np.stack(list(own_weights.values())), rtol=1e-5, atol=1e-6)


@both_storages
def test_every_layer_of_a_stack_keeps_its_number(storage: str) -> None:
    """Eight layers in a scan, at 95%: 48 active weights each, whatever their gradients."""
    params = {"layers": jax.random.normal(jax.random.key(0), (8, 32, 32)), "out": jnp.ones((32, 3))}
    tx = agent_optax.sparsify(optax.adam(3e-3), agent_optax.rigl(update_every=2), sparsity=0.95, storage=storage)
    scale = jnp.arange(1.0, 9)[:, None, None]
    gradient = lambda p, step: {"layers": jnp.sin(scale * 7 * p["layers"] + step) * scale, "out": p["out"]}  # noqa: E731
    params, opt_state, _ = train(tx, params, gradient, 9)
    masks = agent_optax.active_masks(opt_state, params)
    assert masks["layers"].sum((1, 2)).tolist() == [48] * 8
    apart = {f"layer_{i}": params["layers"][i] for i in range(8)} | {"out": params["out"]}
    masks = agent_optax.active_masks(tx.init(apart), apart)
    assert [int(mask.sum()) for mask in masks.values()][:8] == [48] * 8


def test_magnitude_masks_of_a_stack() -> None:
    weights = jax.random.normal(jax.random.key(0), (8, 32, 32))
    params = {"layers": weights.at[2].multiply(0.3), "out": jnp.ones((32, 3))}
    masks = agent_optax.magnitude_masks(params, 0.9, scope="layer")
    assert len(set(masks["layers"].sum((1, 2)).tolist())) == 1
    masks = agent_optax.magnitude_masks({"layers": weights.at[2].multiply(1e-3)}, 0.99)
    assert masks["layers"].sum((1, 2)).tolist()[2] == 1  # no layer loses all
    assert masks["layers"].sum() == int(0.01 * weights.size)


def test_a_distribution_may_treat_layers_of_a_stack_differently() -> None:
    def rising(shapes: Any, sparsity: float) -> list[float]:
        assert shapes == [(8, 4)] * 4
        return [0.125, 0.25, 0.5, 1.0]

    params = {"layers": jax.random.normal(jax.random.key(0), (4, 8, 4))}
    for storage in ("dense", "compact"):
        tx = agent_optax.sparsify(
            optax.sgd(0.1), agent_optax.rigl(update_every=1), sparsity=0.5, distribution=rising, storage=storage
        )
        params, opt_state, _ = train(tx, params, lambda p, step: jax.tree.map(lambda x: jnp.sin(9 * x + step), p), 3)
        masks = agent_optax.active_masks(opt_state, params)
        assert masks["layers"].sum((1, 2)).tolist() == [4, 8, 16, 32]


def test_a_layer_of_a_stack_that_would_be_empty_is_named() -> None:
    params = {"layers": jnp.ones((2, 3, 4)), "out": jnp.ones((30, 40))}
    tx = agent_optax.sparsify(optax.sgd(0.1), agent_optax.static(), sparsity=0.99, distribution=agent_optax.uniform)
    with pytest.warns(UserWarning, match=r"layers\[0\] gets 1, layers\[1\] gets 1\."):
        masks = agent_optax.active_masks(tx.init(params), params)
    assert masks["layers"].sum((1, 2)).tolist() == [1, 1]
    assert masks["out"].sum() == 10


# Defaults.


def test_linen() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:  # [batch, 8, 6]
            x = nn.Conv(6, (3,))(x)
            x = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8, name="attention")(x)
            x = nn.DenseGeneral((2, 5))(x)
            x = nn.DenseGeneral(6, axis=(-2, -1))(x)
            x, _ = nn.scan(
                lambda cell, x, _: (cell(x), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=4,
            )(nn.Dense(6, name="scanned_layers"), x, None)
            x = nn.RNN(nn.LSTMCell(6))(x)
            return nn.Conv(4, (3, 3), feature_group_count=2)(x[..., None, :])

    params = Net().init(jax.random.key(0), jnp.ones((1, 8, 6)))["params"]
    found = axes_by_name(params)
    assert found["Conv_0/kernel"] == known(spatial=0, inputs=1, outputs=2)
    assert found["Conv_1/kernel"] == known(spatial=(0, 1), inputs=2, outputs=3)
    for name in ("query", "key", "value"):
        assert found[f"attention/{name}/kernel"] == known(inputs=0, outputs=(1, 2))
    assert found["attention/out/kernel"] == known(inputs=(0, 1), outputs=2)
    assert found["DenseGeneral_0/kernel"] == known(inputs=0, outputs=(1, 2))
    assert found["DenseGeneral_1/kernel"] == known(spatial=0, inputs=1, outputs=2)
    assert found["scanned_layers/kernel"] == known(stack=0, inputs=1, outputs=2)
    assert all(found[f"LSTMCell_0/{gate}/kernel"] == known(inputs=0, outputs=1) for gate in ("ii", "hf"))


def test_nnx_stack() -> None:
    """Biases tell of the stack that nnx.vmap makes, whatever its modules are called."""

    @nnx.vmap
    def create(rngs: nnx.Rngs) -> nnx.Module:
        layers = (nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs), nnx.Linear(8, 5, rngs=rngs))
        return nnx.List([*layers, nnx.Conv(5, 4, (3, 3), rngs=rngs)])

    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.trunk = create(rngs.split(3))
            self.layers = nnx.List([nnx.Linear(8, 8, use_bias=False, rngs=rngs) for _ in range(2)])

    found = axes_by_name(nnx.state(Model(nnx.Rngs(0)), nnx.Param))
    assert found["trunk/0/query/kernel"] == known(stack=0, inputs=1, outputs=(2, 3))
    assert found["trunk/0/out/kernel"] == known(stack=0, inputs=(1, 2), outputs=3)
    assert found["trunk/1/kernel"] == known(stack=0, inputs=1, outputs=2)
    assert found["trunk/2/kernel"] == known(stack=0, spatial=(1, 2), inputs=3, outputs=4)
    assert found["layers/0/kernel"] == known(inputs=0, outputs=1)


EXAMPLES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "experts": (
        {"moe/experts/wi": (4, 8, 16), "moe/experts/wo": (4, 16, 8), "moe/router/kernel": (8, 4)},
        {"moe/experts/wi": known(stack=0, inputs=1, outputs=2), "moe/router/kernel": known(inputs=0, outputs=1)},
    ),
    "layers of experts": (
        {"layers/experts/wi": (3, 4, 8, 16), "layers/norm/scale": (3, 8)},
        {
            "layers/experts/wi": known(stack=(0, 1), inputs=2, outputs=3),
            "layers/norm/scale": known(inputs=0, outputs=1),
        },
    ),
    "layers on the second axis, as in MaxText": (
        {"layers/wi/kernel": (16, 3, 8), "layers/wo/kernel": (8, 3, 16), "layers/norm/scale": (16, 3)},
        {"layers/wi/kernel": known(inputs=0, stack=1, outputs=2)},
    ),
    "attention without biases, in a scan": (
        {
            "layers/attn/query/kernel": (3, 16, 2, 8),
            "layers/attn/key/kernel": (3, 16, 1, 8),
            "layers/attn/out/kernel": (3, 2, 8, 16),
            "layers/norm/scale": (3, 16),
        },
        {
            "layers/attn/query/kernel": known(stack=0, inputs=1, outputs=(2, 3)),
            "layers/attn/key/kernel": known(stack=0, inputs=1, outputs=(2, 3)),
            "layers/attn/out/kernel": known(stack=0, inputs=(1, 2), outputs=3),
        },
    ),
    "bare attention": (
        {"wq": (16, 2, 8), "wo": (2, 8, 16)},
        {"wq": known(inputs=0, outputs=(1, 2)), "wo": known(inputs=(0, 1), outputs=2)},
    ),
    "numbered layers": (
        {"layers/0/conv/kernel": (3, 5, 7), "layers_1/conv/kernel": (3, 5, 7)},
        {"layers/0/conv/kernel": known(spatial=0, inputs=1, outputs=2)},
    ),
    "Haiku": (
        {"net/conv2_d/w": (3, 3, 4, 8), "net/linear/w": (8, 5), "net/__layer_stack_no_per_layer/linear/w": (6, 8, 8)},
        {
            "net/conv2_d/w": known(spatial=(0, 1), inputs=2, outputs=3),
            "net/__layer_stack_no_per_layer/linear/w": known(stack=0, inputs=1, outputs=2),
        },
    ),
    "Equinox": (
        {
            "linear/weight": (5, 8),
            "conv/weight": (8, 4, 3, 3),
            "conv/bias": (8, 1, 1),
            "conv1d/weight": (8, 4, 3),
            "ensemble/weight": (6, 5, 8),
            "mapped/weight": (6, 5, 8),
            "mapped/bias": (6, 5),
        },
        {
            "linear/weight": known(outputs=0, inputs=1),
            "conv/weight": known(outputs=0, inputs=1, spatial=(2, 3)),
            "conv1d/weight": known(outputs=0, inputs=1, spatial=2),
            "ensemble/weight": known(stack=0, outputs=1, inputs=2),
            "mapped/weight": known(stack=0, outputs=1, inputs=2),
        },
    ),
    "unknown": (
        {"wi/kernel": (16, 4, 8), "bias": (8,)},
        {"wi/kernel": (Axes(spatial=0, inputs=1, outputs=2), False), "bias": known(outputs=0)},
    ),
}


@pytest.mark.parametrize("example", EXAMPLES)
def test_conventions(example: str) -> None:
    shapes, expected = EXAMPLES[example]
    found = default_axes(shapes)
    assert {name: found[name] for name in expected} == expected


# Patterns see the matrix of the product, and distributions its inputs and outputs.


def attention_params() -> Any:
    net = nn.MultiHeadDotProductAttention(num_heads=8, qkv_features=32)
    return net.init(jax.random.key(0), jnp.ones((1, 5, 32)))["params"]


@both_storages
def test_two_of_four_on_attention(storage: str) -> None:
    params = attention_params()
    tx = agent_optax.sparsify(
        optax.sgd(0.1), agent_optax.rigl(update_every=1), pattern=agent_optax.n_m(2, 4), storage=storage
    )
    gradient = lambda p, step: jax.tree.map(lambda x: jnp.cos(9 * x + step), p)  # noqa: E731
    params, opt_state, _ = train(tx, params, gradient, 3)
    masks = agent_optax.active_masks(opt_state, params)
    for name in ("query", "key", "value", "out"):
        matrix = np.asarray(masks[name]["kernel"]).reshape(32, 32)  # x @ W sums over the first axis
        assert np.all(matrix.reshape(8, 4, 32).sum(1) == 2), name
    report = export.n_m_report(masks)
    assert all(layer.is_n_m for layer in report.values())
    across_heads = {"query": {"kernel": np.arange(32 * 8 * 4).reshape(32, 8, 4) % 8 < 4}}
    assert not export.n_m_report(across_heads, axes=lambda *_: Axes(inputs=0, outputs=(1, 2)))["query/kernel"].is_n_m


@pytest.mark.parametrize("distribution", [agent_optax.erk, agent_optax.erdos_renyi])
def test_attention_has_the_density_of_its_matrices(distribution: Any) -> None:
    params = attention_params()
    kernels = {name: layer["kernel"] for name, layer in params.items()} | {"mlp": jnp.ones((32, 128))}
    matrices = {name: kernel.reshape(32, -1) for name, kernel in kernels.items()}

    def counts(params: Any) -> dict[str, int]:
        tx = agent_optax.sparsify(optax.sgd(0.1), agent_optax.static(), sparsity=0.9, distribution=distribution)
        return {name: int(mask.sum()) for name, mask in agent_optax.active_masks(tx.init(params), params).items()}

    assert counts(kernels) == counts(matrices)


def test_channels_of_each_layer_of_a_stack() -> None:
    params = {"layers": jax.random.normal(jax.random.key(0), (8, 16, 16))}
    tx = agent_optax.sparsify(optax.sgd(0.1), agent_optax.static(), sparsity=0.5, pattern=agent_optax.output_channels())
    mask = np.asarray(agent_optax.active_masks(tx.init(params), params)["layers"])
    assert np.all(mask == mask[:, :1]) and mask[:, 0].sum(1).tolist() == [8] * 8
    assert not np.all(mask == mask[:1])  # by themselves


# Errors.


def test_a_pattern_on_axes_of_unknown_meaning() -> None:
    params = {"wi": {"kernel": jnp.ones((16, 4, 8))}}
    for pattern in (agent_optax.n_m(2, 4), agent_optax.fan_in(), agent_optax.blocks((2, 2))):
        tx = agent_optax.sparsify(optax.sgd(0.1), agent_optax.static(), sparsity=0.5, pattern=pattern)
        with pytest.raises(ValueError, match=r"wi/kernel, whose shape is \(16, 4, 8\).*axes=lambda name, shape"):
            tx.init(params)
    tx = agent_optax.sparsify(
        optax.sgd(0.1),
        agent_optax.static(),
        pattern=agent_optax.n_m(2, 4),
        axes=lambda name, shape: Axes(inputs=0, stack=1, outputs=2) if name == "wi/kernel" else None,
    )
    mask = np.asarray(agent_optax.active_masks(tx.init(params), params)["wi"]["kernel"])
    assert np.all(mask.reshape(4, 4, 4, 8).sum(1) == 2)
