"""Models with sparse layers go through `jax.export` and its bytes, with a batch of any size."""

from typing import Any

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from layers_of_each_kind import connect

import agent_optax.flax
from agent_optax import layers

CHECKS = [jax.export.DisabledSafetyCheck.custom_call("LayoutConstraint")]


def through_bytes(function: Any, *arguments: Any) -> Any:
    exported = jax.export.export(jax.jit(function), disabled_checks=CHECKS)(*arguments)
    return jax.export.deserialize(exported.serialize()).call


def any_batch(shape: str) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape), jnp.float32)


class Net(nnx.Module):
    def __init__(self, kind: str) -> None:
        rngs = nnx.Rngs(0)
        sparse = agent_optax.flax.nnx
        self.conv = sparse.SparseConv(4, 20, 3, connections=connect(kind, 36, 20), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(20, use_running_average=True, rngs=rngs)
        self.hidden = sparse.SparseLinear(20, 21, connections=connect(kind, 20, 21), rngs=rngs)
        self.head = nnx.Linear(21, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.conv(x))).mean((1, 2))
        return self.head(nnx.relu(self.hidden(x)))


@pytest.mark.parametrize("kind", ["fan_in:3", "fan_in:16", "any_mask"])
def test_a_model_of_nnx(kind: str) -> None:
    """Weights and connections are constants; sizes of the batch that are worked on in blocks, too."""
    model = Net(kind)
    call = through_bytes(lambda x: model(x), any_batch("batch, 5, 6, 4"))
    for batch in (1, 7, 60):
        x = jax.random.normal(jax.random.key(batch), (batch, 5, 6, 4))
        np.testing.assert_allclose(call(x), nnx.jit(Net.__call__)(model, x), rtol=1e-4, atol=1e-5)


def test_a_model_of_linen_with_its_variables_as_arguments() -> None:
    """Connections of another start go in as well as those that it was exported with."""
    net = nn.Sequential([agent_optax.flax.linen.SparseDense(20, sparsity=0.7, group=4), nn.relu, nn.Dense(3)])
    x = jax.random.normal(jax.random.key(0), (5, 12))
    first, second = (net.init(jax.random.key(seed), x) for seed in range(2))
    call = through_bytes(net.apply, jax.eval_shape(lambda: first), any_batch("batch, 12"))
    for variables in (first, second):
        np.testing.assert_allclose(call(variables, x), net.apply(variables, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["fan_in:3", "any_mask"])
def test_connections_and_a_gradient(kind: str) -> None:
    """After a topology update too, when connections hold those of a snapshot; with a batch of known size."""
    connections = {"hidden": connect(kind, 12, 20)}
    params = {"hidden": layers.init_values(jax.random.key(1), connections["hidden"])}
    tx = agent_optax.svrg(0.1)
    prepared = layers.prepare_rewiring(params, connections, tx.init(params))
    assert prepared["hidden"].point is not None
    x = jax.random.normal(jax.random.key(2), (5, 12))

    def loss(params: Any, connections: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(layers.sparse_dot(x, params["hidden"], connections["hidden"])))

    grads = through_bytes(jax.grad(loss), params, prepared, x)(params, prepared, x)
    kernel = layers.to_dense(params["hidden"], connections["hidden"])
    expected = layers.from_dense(x.T @ jnp.cos(x @ kernel), connections["hidden"])
    np.testing.assert_allclose(grads["hidden"], expected, rtol=1e-4, atol=1e-5)
