"""Topology updates of the sparse layers of a Flax model."""

from pathlib import Path

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

TOPOLOGY = agent_optax.rigl(update_every=3, drop_fraction=0.4)
DATA = jax.random.normal(jax.random.key(0), (4, 8, 6, 6, 2))


class Net(nnx.Module):
    """A convolution with BatchNorm and dropout, and a layer that is not sparse."""

    def __init__(self, seed: int):
        rngs = nnx.Rngs(seed)
        self.conv = agent_optax.flax.nnx.SparseConv(2, 8, 3, strides=2, sparsity=0.6, group=4, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.blocks = nnx.List(
            [agent_optax.flax.nnx.SparseLinear(72, 72, sparsity=0.9, group=1, rngs=rngs) for _ in range(2)]
        )
        self.head = nnx.Linear(72, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.dropout(nnx.relu(self.norm(self.conv(x)))).reshape(len(x), -1)
        for block in self.blocks:
            x = jnp.tanh(block(x))
        return self.head(x)[:, 0]


def loss_fn(model: Net, batch: jax.Array) -> jax.Array:
    return jnp.mean((model(batch) - jnp.sin(batch[:, 0, 0, 0] * 3)) ** 2)


grads_fn = agent_optax.flax.nnx.value_and_grads(loss_fn)


@nnx.jit
def step(model: Net, optimizer: nnx.Optimizer, batch: jax.Array) -> jax.Array:
    (value, grads), extras = grads_fn(model, optimizer, batch)
    optimizer.update(model, grads, **extras)
    return value


def train(model: Net, optimizer: nnx.Optimizer, steps: range) -> list[int]:
    """The numbers of weights that each topology update has grown."""
    num_grown = []
    for t in steps:
        if t % 5 == 0:
            agent_optax.flax.nnx.refresh(loss_fn, model, optimizer, DATA)
        step(model, optimizer, DATA[t % 4])
        if TOPOLOGY.is_due(t + 1):
            grown, is_finite = agent_optax.flax.nnx.rewire(
                loss_fn, model, optimizer, DATA[t % 4], topology=TOPOLOGY, step=t + 1, key=jax.random.key(t)
            )
            assert is_finite
            num_grown.append(int(grown))
    return num_grown


def make() -> tuple[Net, nnx.Optimizer]:
    model = Net(0)
    optimizer = nnx.Optimizer(model, agent_optax.agent(0.05, momentum=0.9), wrt=nnx.Param)
    agent_optax.flax.nnx.prepare_rewiring(model, optimizer)
    return model, optimizer


def test_nnx_trains_through_rewirings_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = make()
    before = nnx.clone(model)
    num_grown = train(model, optimizer, range(8))
    assert len(num_grown) == 2 and min(num_grown) > 0
    for layer, old in zip((model.conv, *model.blocks), (before.conv, *before.blocks), strict=True):
        connections, was = layer.connections.get_value(), old.connections.get_value()
        assert (connections.indices != was.indices).any()
        assert connections.values_shape == was.values_shape == layer.values.shape
        assert (np.diff(connections.indices, axis=1) > 0).all()

    checkpointer = orbax.checkpoint.StandardCheckpointer()
    state = nnx.to_pure_dict(nnx.state((model, optimizer)))
    state = jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, state)
    checkpointer.save(tmp_path / "run", state)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / "run", jax.tree.map(jnp.zeros_like, state))
    jax.tree.map(np.testing.assert_array_equal, restored, state)

    resumed, resumed_optimizer = make()
    own = nnx.to_pure_dict(nnx.state((resumed, resumed_optimizer)))
    wrapped = jax.tree.map(
        lambda x, new: jax.random.wrap_key_data(new) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else new,
        own,
        restored,
    )
    nnx.update((resumed, resumed_optimizer), wrapped)
    assert train(resumed, resumed_optimizer, range(8, 12)) == train(model, optimizer, range(8, 12))
    jax.tree.map(
        np.testing.assert_array_equal,
        nnx.to_pure_dict(nnx.state(resumed, nnx.Param)),
        nnx.to_pure_dict(nnx.state(model, nnx.Param)),
    )


def test_linen_is_rewired_as_bare_arrays_are() -> None:
    class LinenNet(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = agent_optax.flax.linen.SparseDense(72, sparsity=0.8, group=8)(x.reshape(len(x), -1))
            return nn.Dense(1)(jnp.tanh(x))[:, 0]

    net = LinenNet()
    variables = net.init(jax.random.key(0), DATA[0])

    def linen_loss(params: optax.Params, batch: jax.Array, connections: optax.Params) -> jax.Array:
        y = net.apply({"params": params, "connections": connections}, batch)
        return jnp.mean((y - jnp.sin(batch[:, 0, 0, 0])) ** 2)

    tx = optax.adam(1e-3)
    opt_state = tx.init(variables["params"])
    rewired = layers.rewire(
        linen_loss, variables["params"], variables["connections"], opt_state, DATA[0], tx=tx, topology=TOPOLOGY, step=3,
        key=jax.random.key(1),
    )  # fmt: skip
    old = variables["connections"]["SparseDense_0"]["connections"]
    new = rewired.connections["SparseDense_0"]["connections"]
    gone = np.asarray(old.mask() & ~new.mask())
    assert gone.sum() == rewired.num_grown > 0
    before, after = (layers.to_dense(p["SparseDense_0"]["values"], c) for p, c in (
        (variables["params"], old), (rewired.params, new)))  # fmt: skip
    np.testing.assert_array_equal(after, np.where(gone, 0, before))
    np.testing.assert_array_equal(rewired.params["Dense_0"]["kernel"], variables["params"]["Dense_0"]["kernel"])


def test_errors() -> None:
    model, _ = make()
    with pytest.raises(TypeError, match=r"optimizer must be a flax\.nnx\.Optimizer"):
        agent_optax.flax.nnx.rewire(loss_fn, model, None, DATA[0], topology=TOPOLOGY, step=3, key=jax.random.key(0))
    dense = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    own = nnx.Optimizer(dense, optax.sgd(0.1), wrt=nnx.Param)
    with pytest.raises(ValueError, match="connections holds none"):
        agent_optax.flax.nnx.rewire(loss_fn, dense, own, DATA[0], topology=TOPOLOGY, step=3, key=jax.random.key(0))
