"""Sparse layers of Flax are the dense ones with the dense kernel, and train as any model does."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import nnx

import agent_optax
import agent_optax.flax
from agent_optax import layers

X = jax.random.normal(jax.random.key(0), (6, 20))
IMAGES = jax.random.normal(jax.random.key(1), (2, 5, 5, 4))


def connections_of(layer):
    return nnx.as_pure(nnx.state(layer, agent_optax.flax.nnx.SparseConnections))["connections"]


def dense_of(layer):
    return layers.to_dense(layer.values[...], connections_of(layer))


@pytest.mark.parametrize("group", [1, 16])
def test_sparse_linear_is_linear_with_the_dense_kernel(group):
    layer = agent_optax.flax.nnx.SparseLinear(20, 33, sparsity=0.8, group=group, rngs=nnx.Rngs(0))
    dense = nnx.Linear(20, 33, rngs=nnx.Rngs(0))
    layer.bias[...] = jax.random.normal(jax.random.key(2), 33)
    dense.kernel[...], dense.bias[...] = dense_of(layer), layer.bias[...]
    assert layer.values.shape == (33, 4)
    np.testing.assert_allclose(layer(X), dense(X), atol=1e-5)


@pytest.mark.parametrize(("strides", "padding"), [(1, "SAME"), ((2, 1), "VALID"), (2, ((1, 0), (0, 2)))])
def test_sparse_conv_is_conv_with_the_dense_kernel(strides, padding):
    options = {"strides": strides, "padding": padding, "use_bias": False, "rngs": nnx.Rngs(0)}
    layer = agent_optax.flax.nnx.SparseConv(4, 10, (3, 2), sparsity=0.7, group=8, **options)
    dense = nnx.Conv(4, 10, (3, 2), **options)
    dense.kernel[...] = dense_of(layer).reshape(3, 2, 4, 10)
    np.testing.assert_allclose(layer(IMAGES), dense(IMAGES), atol=1e-5)


def test_given_connections():
    mask = jax.random.uniform(jax.random.key(3), (20, 7)) < 0.3
    connections = layers.AnyMask.from_mask(mask)
    layer = agent_optax.flax.nnx.SparseLinear(20, 7, connections=connections, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(dense_of(layer) != 0, mask)
    np.testing.assert_allclose(layer(X), X @ dense_of(layer), atol=1e-5)


def test_the_scale_of_the_start_knows_the_fan_in():
    for connections in (
        layers.FanIn.random(jax.random.key(0), inputs=1000, outputs=3000, density=0.02),
        layers.AnyMask.random(jax.random.key(0), inputs=1000, outputs=3000, density=0.02),
    ):
        he = layers.init_values(jax.random.key(1), connections, jax.nn.initializers.he_normal())
        assert float(he.var()) == pytest.approx(2 / 20, rel=0.05)
        assert layers.init_values(jax.random.key(1), connections, dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_computation_and_parameters_have_their_dtypes():
    options = {"sparsity": 0.8, "dtype": jnp.bfloat16, "param_dtype": jnp.float16, "rngs": nnx.Rngs(0)}
    layer = agent_optax.flax.nnx.SparseLinear(20, 33, **options)
    assert layer.values.dtype == layer.bias.dtype == jnp.float16
    assert layer(X).dtype == jnp.bfloat16


class Block(nnx.Module):
    """The MLP of a transformer, with attention beside it."""

    def __init__(self, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)
        self.up = nnx.Linear(16, 64, rngs=rngs)
        self.down = nnx.Linear(64, 16, param_dtype=jnp.float32, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(x)
        return x + self.down(nnx.gelu(self.up(x)))


class Transformer(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(3, 16, (3, 3), strides=2, rngs=rngs)
        self.depthwise = nnx.Conv(16, 16, (3, 3), feature_group_count=16, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.head = nnx.Linear(16, 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.depthwise(self.conv(x))
        x = x.reshape(len(x), -1, 16)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=1))


def kinds(model):
    return {"/".join(map(str, path)): type(layer).__name__ for path, layer in nnx.iter_modules(model)}


def test_sparse_layers_swaps_the_layers_of_a_transformer_and_it_trains():
    model = Transformer()
    bias = model.head.bias
    agent_optax.flax.nnx.sparse_layers(model, sparsity=0.5, distribution=agent_optax.uniform, group=8, rngs=nnx.Rngs(1))
    found = kinds(model)
    assert found["conv"] == "SparseConv" and found["depthwise"] == "Conv"
    assert {found[f"blocks/{i}/{name}"] for i in (0, 1) for name in ("up", "down")} == {"SparseLinear"}
    assert found["blocks/0/attention/query"] == "LinearGeneral"
    assert model.head.bias is bias and model.blocks[0].down.bias is None and model.conv.strides == 2
    optimizer = nnx.Optimizer(model, optax.adam(0.01), wrt=nnx.Param)
    x, labels = jax.random.normal(jax.random.key(2), (8, 8, 8, 3)), jnp.arange(8) % 5

    @nnx.jit
    def step(model, optimizer):
        def loss_fn(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()

        value, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return value

    before = connections_of(model.blocks[1].up)
    values = [float(step(model, optimizer)) for _ in range(20)]
    assert values[-1] < 0.2 * values[0]
    jax.tree.map(np.testing.assert_array_equal, connections_of(model.blocks[1].up), before)


def test_sparse_layers_leaves_what_is_dense_or_not_chosen():
    model = Transformer()
    options = {
        "sparsity": 0.5,
        "rngs": nnx.Rngs(1),
        "distribution": lambda shapes, s: [1.0] + [0.5] * (len(shapes) - 1),
    }
    agent_optax.flax.nnx.sparse_layers(model, where=lambda path, layer: path.endswith(("head", "up")), **options)
    names = ("conv", "blocks/0/up", "blocks/0/down", "blocks/1/up", "head")
    types = [kinds(model)[name] for name in names]
    assert types.count("SparseLinear") == 2 and types[0] == "Conv" and types[2] == "Linear"


def test_corrections_work_on_the_values_as_they_are():
    model = nnx.Sequential(nnx.Linear(20, 32, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(32, 8, rngs=nnx.Rngs(1)))
    agent_optax.flax.nnx.sparse_layers(model, sparsity=0.5, rngs=nnx.Rngs(2))
    optimizer = nnx.Optimizer(model, agent_optax.svrg(0.05), wrt=nnx.Param)
    batches = jax.random.normal(jax.random.key(3), (4, 6, 20))

    def loss_fn(model, batch):
        return jnp.mean((model(batch) - 1.0) ** 2)

    agent_optax.flax.nnx.refresh(loss_fn, model, optimizer, batches)
    grads_fn = agent_optax.flax.nnx.value_and_grads(loss_fn)
    values = []
    for batch in [*batches] * 5:
        (value, grads), extras = grads_fn(model, optimizer, batch)
        optimizer.update(model, grads, **extras)
        values.append(float(value))
    assert values[-1] < 0.5 * values[0]


def test_a_checkpoint_holds_connections_and_values(tmp_path):
    options = {"sparsity": 0.8, "group": 4}
    model = agent_optax.flax.nnx.SparseLinear(20, 33, rngs=nnx.Rngs(0), **options)
    other = agent_optax.flax.nnx.SparseLinear(20, 33, rngs=nnx.Rngs(1), **options)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", nnx.as_pure(nnx.state(model)))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "model", nnx.as_pure(nnx.state(other)))
    nnx.update(other, restored)
    np.testing.assert_array_equal(other(X), model(X))


def test_errors_quote_the_value():
    make, rngs = agent_optax.flax.nnx.SparseLinear, nnx.Rngs(0)
    mask = layers.AnyMask.from_mask(jnp.ones((3, 4), bool))
    with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\), got 1\.0"):
        make(3, 4, sparsity=1.0, rngs=rngs)
    with pytest.raises(ValueError, match="either sparsity= or connections=, got None and None"):
        make(3, 4, rngs=rngs)
    with pytest.raises(ValueError, match=r"either sparsity= or connections=, got 0\.5 and AnyMask"):
        make(3, 4, sparsity=0.5, connections=mask, rngs=rngs)
    with pytest.raises(ValueError, match="5 inputs and 4 outputs, its connections 3 and 4"):
        make(5, 4, connections=mask, rngs=rngs)
    swap = agent_optax.flax.nnx.sparse_layers
    with pytest.raises(ValueError, match="look at where="):
        swap(Transformer(), sparsity=0.5, where=lambda path, layer: False, rngs=rngs)
    with pytest.raises(ValueError, match="the model itself is the layer"):
        swap(nnx.Linear(3, 4, rngs=rngs), sparsity=0.5, rngs=rngs)
    shared = nnx.Linear(4, 4, rngs=rngs)
    with pytest.raises(ValueError, match=r"layers/\d is used in several places"):
        swap(twice := nnx.Sequential(shared, shared), sparsity=0.5, rngs=rngs)
    assert twice.layers[0] is twice.layers[1] is shared  # nothing half-done
    with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\), got 1\.5"):
        swap(Transformer(), sparsity=1.5, rngs=rngs)


def test_linen_layers_are_the_dense_ones_with_the_dense_kernel():
    dense = agent_optax.flax.linen.SparseDense(33, sparsity=0.8)
    variables = dense.init(jax.random.key(0), X)
    kernel = layers.to_dense(variables["params"]["values"], variables["connections"]["connections"])
    params = {"kernel": kernel, "bias": variables["params"]["bias"]}
    np.testing.assert_allclose(dense.apply(variables, X), nn.Dense(33).apply({"params": params}, X), atol=1e-5)
    options = {"strides": 2, "padding": "VALID", "use_bias": False}
    conv = agent_optax.flax.linen.SparseConv(10, (3, 3), sparsity=0.7, group=8, **options)
    variables = jax.jit(conv.init)(jax.random.key(0), IMAGES)
    assert set(variables["params"]) == {"values"}
    kernel = layers.to_dense(variables["params"]["values"], variables["connections"]["connections"])
    expected = nn.Conv(10, (3, 3), **options).apply({"params": {"kernel": kernel.reshape(3, 3, 4, 10)}}, IMAGES)
    np.testing.assert_allclose(conv.apply(variables, IMAGES), expected, atol=1e-5)


def test_linen_state_trains_the_values_only():
    net = nn.Sequential([agent_optax.flax.linen.SparseDense(32, sparsity=0.8), nn.relu, nn.Dense(1)])
    variables = net.init(jax.random.key(0), X)
    rest = {"connections": variables["connections"]}
    state = agent_optax.flax.linen.TrainState.create(
        apply_fn=net.apply, params=variables["params"], tx=optax.adam(0.01)
    )

    @jax.jit
    def step(state):
        value, grads = jax.value_and_grad(lambda p: jnp.mean((net.apply({"params": p, **rest}, X) - X[:, :1]) ** 2))(
            state.params
        )
        return state.apply_gradients(grads=grads), value

    values = []
    for _ in range(60):
        state, value = step(state)
        values.append(float(value))
    assert values[-1] < 0.1 * values[0]
    with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\), got 2"):
        agent_optax.flax.linen.SparseDense(3, sparsity=2.0).init(jax.random.key(0), X)


class ConvNet(nnx.Module):
    """A convolution, and layers with groups of outputs that do and do not divide."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(4, 32, (3, 3), strides=2, rngs=rngs)
        self.hidden = nnx.Linear(32, 40, rngs=rngs)
        self.head = nnx.Linear(40, 5, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.conv(x)).mean((1, 2))
        return self.head(nnx.relu(self.hidden(x)))


PATTERNS = {
    "fan_in(group=16)": (agent_optax.fan_in(group=16), layers.FanIn, 16),
    "fan_in()": (agent_optax.fan_in(), layers.FanIn, 1),
    "none": (None, layers.AnyMask, 1),
}


@pytest.mark.parametrize(
    ("pattern", "storage"), [("fan_in(group=16)", "dense"), ("fan_in()", "compact"), ("none", "compact")]
)
def test_a_pruned_model_becomes_sparse_layers_with_equal_outputs(pattern: str, storage: str) -> None:
    chosen, kind, group = PATTERNS[pattern]
    model = ConvNet()
    tx = agent_optax.sparsify(
        optax.sgd(0.1), agent_optax.static(), sparsity=0.8, distribution=agent_optax.uniform, pattern=chosen,
        storage=storage,
    )  # fmt: skip
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    agent_optax.flax.nnx.mask_model(model, optimizer)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))

    @nnx.jit
    def step(model: ConvNet, optimizer: nnx.Optimizer) -> None:
        optimizer.update(model, nnx.grad(lambda model: jnp.sum(model(x) ** 2))(model))

    for _ in range(2):
        step(model, optimizer)
    state = agent_optax.flax.nnx.opt_state(optimizer)
    num_active = sum(int(mask.sum()) for mask in jax.tree.leaves(agent_optax.active_masks(state, model)))
    expected = model(x)
    agent_optax.flax.nnx.to_sparse_layers(model, state)
    sparse = [model.conv, model.hidden, model.head]
    for layer in sparse:
        connections = layer.connections.get_value()
        assert type(connections) is kind and connections.group == group
    assert sum(layer.values.size for layer in sparse) == num_active
    np.testing.assert_allclose(model(x), expected, rtol=1e-4, atol=1e-5)
    grads = nnx.grad(lambda model: jnp.sum(model(x) ** 2))(model)
    assert jax.tree.structure(grads) == jax.tree.structure(nnx.state(model, nnx.Param))


def test_a_model_without_pruned_layers_stays_as_it_is() -> None:
    model = ConvNet()
    masks = jax.tree.map(lambda p: None, nnx.state(model, nnx.Param))
    with pytest.raises(ValueError, match="masks holds none"):
        agent_optax.flax.nnx.to_sparse_layers(model, masks)
    masks = agent_optax.magnitude_masks(nnx.state(model, nnx.Param), 0.5)
    with pytest.raises(ValueError, match="inactive weights of conv/kernel are not zero"):
        agent_optax.flax.nnx.to_sparse_layers(model, masks)
    assert type(model.conv) is nnx.Conv and type(model.hidden) is nnx.Linear
