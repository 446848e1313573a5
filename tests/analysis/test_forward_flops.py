"""FLOPs against counts by hand, and products matched to the parameters that take part in them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from agent_optax import analysis
from agent_optax.analysis import forward_flops

X = jnp.ones((3, 8))
W, V = jnp.ones((8, 5)), jnp.ones((5, 2))


def count(apply_fn, params, *inputs) -> tuple:
    counted = forward_flops(apply_fn, params, *inputs)
    return counted.per_leaf, counted.other


def test_dense_layers():
    def apply_fn(params, x):
        return jax.nn.relu(x @ params["w"] + params["b"]) @ params["v"]

    per_leaf, other = count(apply_fn, {"w": W, "b": jnp.ones(5), "v": V}, X)
    assert per_leaf == {"w": 2 * 3 * 8 * 5, "b": 0, "v": 2 * 3 * 5 * 2}
    assert other == 0
    assert forward_flops(apply_fn, {"w": W, "b": jnp.ones(5), "v": V}, X).total() == 240 + 60


def test_batch_dimensions_count():
    def apply_fn(w, x):
        return jnp.einsum("ebi,eio->ebo", x, w)  # one matrix an expert

    assert count(apply_fn, jnp.ones((4, 8, 5)), jnp.ones((4, 3, 8))) == (2 * 4 * 3 * 8 * 5, 0)
    assert count(jax.vmap(lambda w, x: x @ w), jnp.ones((4, 8, 5)), jnp.ones((4, 8))) == (2 * 4 * 8 * 5, 0)


def test_several_contracted_axes():
    def apply_fn(w, x):
        return jnp.einsum("bhd,hdo->bo", x, w)

    assert count(apply_fn, jnp.ones((4, 6, 5)), jnp.ones((3, 4, 6))) == (2 * 3 * 4 * 6 * 5, 0)


CONVOLUTIONS = {
    # kernel size, strides, padding, groups, dilation: output 8 x 8 unless noted
    "same": ({}, 3 * 3 * 4, (8, 8)),
    "valid": ({"padding": "VALID"}, 3 * 3 * 4, (6, 6)),
    "strides": ({"strides": (2, 2)}, 3 * 3 * 4, (4, 4)),
    "uneven strides": ({"strides": (1, 3), "padding": "VALID"}, 3 * 3 * 4, (6, 2)),
    "explicit padding": ({"padding": ((2, 0), (1, 3))}, 3 * 3 * 4, (8, 10)),
    "groups": ({"feature_group_count": 2}, 3 * 3 * 2, (8, 8)),
    "depthwise": ({"feature_group_count": 4}, 3 * 3 * 1, (8, 8)),
    "dilation": ({"kernel_dilation": 2, "padding": "VALID"}, 3 * 3 * 4, (4, 4)),
    "circular": ({"padding": "CIRCULAR"}, 3 * 3 * 4, (8, 8)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_convolutions(name, library):
    arguments, fan_in, (height, width) = CONVOLUTIONS[name]
    x = jnp.ones((2, 8, 8, 4))
    if library == "linen":
        model = nn.Conv(12, (3, 3), **arguments)
        params = model.init(jax.random.key(0), x)["params"]
        counted = forward_flops(lambda params, x: model.apply({"params": params}, x), params, x)
        kernel, bias = counted.per_leaf["kernel"], counted.per_leaf["bias"]
    else:
        graphdef, params = nnx.split(nnx.Conv(4, 12, (3, 3), rngs=nnx.Rngs(0), **arguments))
        counted = forward_flops(lambda params, x: nnx.merge(graphdef, params)(x), params, x)
        kernel, bias = counted.per_leaf["kernel"].get_value(), counted.per_leaf["bias"].get_value()
    assert kernel == 2 * 2 * height * width * fan_in * 12
    assert bias == counted.other == 0


def test_convolutions_in_one_and_three_dimensions():
    for size in ((10,), (5, 6, 7)):
        model = nn.Conv(4, (3,) * len(size), strides=2)
        x = jnp.ones((1, *size, 2))
        params = model.init(jax.random.key(0), x)["params"]
        kernel = forward_flops(lambda p, x, m=model: m.apply({"params": p}, x), params, x).per_leaf["kernel"]
        assert kernel == 2 * np.prod([-(-n // 2) for n in size]) * 3 ** len(size) * 2 * 4


def test_transposed_convolution_leaves_inserted_zeros_out():
    """Each input meets each kernel position once; with stride 2 and kernel 2 none falls off the edge."""
    model = nn.ConvTranspose(6, (2, 2), strides=(2, 2), padding="VALID")
    x = jnp.ones((1, 5, 5, 3))
    params = model.init(jax.random.key(0), x)["params"]
    counted = forward_flops(lambda params, x: model.apply({"params": params}, x), params, x)
    assert counted.per_leaf["kernel"] == 2 * (5 * 5) * (2 * 2) * 3 * 6


def test_batch_groups():
    """The gradient of a grouped convolution: each output still takes kernel positions times kernel channels."""

    def apply_fn(kernel, x):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "VALID", batch_group_count=2, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    x, kernel = jnp.ones((4, 6, 6, 3)), jnp.ones((3, 3, 3, 8))
    assert count(apply_fn, kernel, x) == (2 * (2 * 4 * 4 * 8) * (3 * 3 * 3), 0)


# Each takes (w [8, 5], x [3, 8]) and multiplies x by w once.
PATHS = {
    "jit": lambda w, x: jax.jit(jnp.dot)(x, w),
    "nested jit": lambda w, x: jax.jit(lambda w, x: jax.jit(lambda w: x @ w.astype(jnp.bfloat16))(w))(w, x),
    "checkpoint": lambda w, x: jax.checkpoint(lambda w: jnp.tanh(x @ w))(w),
    "cast": lambda w, x: x.astype(jnp.float16) @ w.astype(jnp.float16),
    "reshape and transpose": lambda w, x: jax.lax.dot(w.reshape(4, 10).reshape(8, 5).T, x.T),
    "mask": lambda w, x: x @ (w * (jnp.arange(40).reshape(8, 5) % 2)),
    "where": lambda w, x: x @ jnp.where(jnp.eye(8, 5, dtype=bool), w, 0.0),
    "standardised": lambda w, x: x @ ((w - w.mean(0)) / (w.std(0) + 1e-5)),
    "left operand": lambda w, x: w.T @ x.T,
    "broadcast": lambda w, x: jnp.einsum("bi,bio->bo", x, jnp.broadcast_to(w, (3, 8, 5))),
    "stop gradient": lambda w, x: x @ jax.lax.stop_gradient(w),
    "scan over inputs": lambda w, x: jax.lax.scan(lambda c, row: (c + row @ w, None), jnp.zeros(5), x)[0],
    "scan over slices": lambda w, x: jax.lax.scan(lambda c, s: (c, s[0] @ s[1]), 0.0, (x.T[:, :, None], w[:, None]))[1],
    "carried": lambda w, x: jax.lax.scan(lambda w, row: (w * 1.0, row @ w), w, x)[1],
    "fori loop": lambda w, x: jax.lax.fori_loop(0, 3, lambda i, y: y + x[i] @ w, jnp.zeros(5)),
    "cond": lambda w, x: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: jnp.zeros((3, 5))),
    "sliced": lambda w, x: jnp.concatenate([x @ w[:, :2], x @ w[:, 2:]], axis=1),
    "bias of parameters first": lambda w, x: (x + w[:, 0]) @ w,
    "while without products": lambda w, x: x @ jax.lax.while_loop(lambda v: v[0, 0] < 0, lambda v: v + 1, w),
}


@pytest.mark.parametrize("name", PATHS)
def test_a_parameter_is_followed_through(name):
    assert count(PATHS[name], W, X) == (2 * 3 * 8 * 5, 0)


def test_custom_derivatives_are_followed():
    @jax.custom_vjp
    def f(w, x):
        return x @ w

    f.defvjp(lambda w, x: (f(w, x), (w, x)), lambda res, g: (res[1].T @ g, g @ res[0].T))

    @jax.custom_jvp
    def g(w, x):
        return x @ w

    g.defjvp(lambda primals, tangents: (g(*primals), g(*primals)))
    assert count(f, W, X) == count(g, W, X) == (240, 0)


def test_stacked_layers_in_a_scan():
    def apply_fn(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])[0] @ params["out"]

    per_leaf, other = count(apply_fn, {"layers": jnp.ones((7, 8, 8)), "out": W}, X)
    assert per_leaf == {"layers": 7 * 2 * 3 * 8 * 8, "out": 240} and other == 0


def test_a_shared_parameter_counts_twice():
    def apply_fn(params, tokens):
        return params["embedding"][tokens] @ params["embedding"].T  # the look-up is free

    assert count(apply_fn, {"embedding": jnp.ones((10, 4))}, jnp.zeros(3, int)) == ({"embedding": 2 * 3 * 4 * 10}, 0)

    def twice(w, x):
        return x @ w @ w

    assert count(twice, jnp.ones((8, 8)), X) == (2 * 2 * 3 * 8 * 8, 0)


def test_activations_are_nobodys():
    def attention(params, x):
        q, k = x @ params["q"], x @ params["k"]
        return jax.nn.softmax(q @ k.T) @ x

    square = jnp.ones((8, 8))
    per_leaf, other = count(attention, {"q": square, "k": square}, X)
    assert per_leaf == {"q": 2 * 3 * 8 * 8, "k": 2 * 3 * 8 * 8}
    assert other == 2 * 3 * 3 * 8 * 2


def test_a_bias_does_not_make_activations_a_parameter():
    def apply_fn(params, x):
        return (x + params["bias"]) @ jnp.ones((8, 5))  # a constant matrix

    assert count(apply_fn, {"bias": jnp.ones(8)}, X) == ({"bias": 0}, 240)


def test_joined_parameters_share_the_cost():
    def apply_fn(params, x):
        return x @ jnp.concatenate([params["k"], params["v"]], axis=1)

    per_leaf, other = count(apply_fn, {"k": jnp.ones((8, 1)), "v": jnp.ones((8, 4))}, X)
    assert per_leaf == {"k": 2 * 3 * 8 * 1, "v": 2 * 3 * 8 * 4} and other == 0


def test_a_scale_does_not_take_the_product_over():
    def apply_fn(params, x):
        direction = params["v"] / jnp.linalg.norm(params["v"], axis=0)
        return x @ (direction * params["scale"])  # weight normalisation

    assert count(apply_fn, {"scale": jnp.ones(5), "v": W}, X) == ({"scale": 0, "v": 240}, 0)


def test_of_two_parameters_the_second_counts():
    def apply_fn(params, x):
        return x[:, :4] @ (params["queries"] @ params["w"])

    per_leaf, other = count(apply_fn, {"queries": jnp.ones((4, 8)), "w": W}, X)
    assert per_leaf == {"queries": 0, "w": 2 * 4 * 8 * 5}
    assert other == 2 * 3 * 4 * 5  # their product is no parameter


def test_the_dearest_branch_counts():
    def apply_fn(params, x):
        return jax.lax.switch(x[0, 0].astype(int), [lambda: x @ params["w"], lambda: x @ params["u"] @ params["v"]])

    params = {"w": jnp.ones((8, 2)), "u": W, "v": V}
    assert count(apply_fn, params, X) == ({"w": 0, "u": 240, "v": 60}, 0)


def test_a_value_that_becomes_an_activation_in_a_loop():
    """After the first turn the carried matrix depends on the inputs: no product of it is the parameter's."""

    def apply_fn(w, x):
        return jax.lax.scan(lambda m, _: (m * x[0, 0], x @ m), w, None, length=4)[1]

    assert count(apply_fn, W, X) == (0, 4 * 240)


def test_shapes_suffice():
    params = jax.eval_shape(lambda: {"w": W})
    per_leaf, _ = count(lambda p, x: x @ p["w"], params, jax.ShapeDtypeStruct((1, 8), jnp.float32))
    assert per_leaf == {"w": 2 * 8 * 5}


def test_products_in_a_while_loop_are_refused():
    def apply_fn(w, x):
        return jax.lax.while_loop(lambda y: y.sum() < 9, lambda y: y @ w, x)

    with pytest.raises(ValueError, match=r"a product of 384 operations in a jax.lax.while_loop.*use jax.lax.scan"):
        forward_flops(apply_fn, jnp.ones((8, 8)), X)


def test_products_in_shard_map_are_refused():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec()
    shard_map = jax.shard_map if hasattr(jax, "shard_map") else None
    if shard_map is None:  # jax < 0.7
        from jax.experimental.shard_map import shard_map
    apply_fn = shard_map(lambda w, x: x @ w, mesh=mesh, in_specs=(spec, spec), out_specs=spec)
    with pytest.raises(ValueError, match=r"inside jax.shard_map.*pass an apply_fn without it"):
        forward_flops(apply_fn, W, X)


class LinenNetwork(nn.Module):
    """A convolution, a grouped one, batch normalisation, a dense layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3), strides=2)(x))
        x = nn.BatchNorm(use_running_average=True)(nn.Conv(16, (3, 3), feature_group_count=16)(x))
        return nn.Dense(10)(x.mean((1, 2)))


class NnxNetwork(nnx.Module):
    """The same."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Conv(3, 16, (3, 3), strides=2, rngs=rngs)
        self.second = nnx.Conv(16, 16, (3, 3), feature_group_count=16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, use_running_average=True, rngs=rngs)
        self.out = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.second(nnx.relu(self.first(x))))
        return self.out(x.mean((1, 2)))


FIRST, SECOND, OUT = 2 * 16 * 16 * 27 * 16, 2 * 16 * 16 * 9 * 16, 2 * 16 * 10  # for an image of 32 x 32 x 3
IMAGE = jnp.ones((1, 32, 32, 3))


def test_a_linen_network():
    model = LinenNetwork()
    variables = model.init(jax.random.key(0), IMAGE)

    def apply_fn(params, x):
        return model.apply({**variables, "params": params}, x)

    counted = analysis.forward_flops(apply_fn, variables["params"], IMAGE)
    kernels = {name: leaves["kernel"] for name, leaves in counted.per_leaf.items() if "kernel" in leaves}
    assert kernels == {"Conv_0": FIRST, "Conv_1": SECOND, "Dense_0": OUT}
    assert counted.total() == FIRST + SECOND + OUT and counted.other == 0


def test_an_nnx_network():
    graphdef, params, rest = nnx.split(NnxNetwork(nnx.Rngs(0)), nnx.Param, ...)

    def apply_fn(params, x):
        return nnx.merge(graphdef, params, rest)(x)

    counted = analysis.forward_flops(apply_fn, params, IMAGE)
    flops = {path[0]: leaf for path, leaf in nnx.to_flat_state(counted.per_leaf) if path[-1] == "kernel"}
    assert {name: leaf.get_value() for name, leaf in flops.items()} == {"first": FIRST, "second": SECOND, "out": OUT}
    assert counted.total() == FIRST + SECOND + OUT and counted.other == 0
