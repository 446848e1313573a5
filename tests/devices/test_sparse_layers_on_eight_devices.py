"""Sparse products on a mesh of eight devices, split along batch and outputs: the numbers of one device."""

from typing import Any

import eight_devices
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import agent_optax
from agent_optax import layers

pytestmark = pytest.mark.devices


INPUTS, OUTPUTS = 36, 32
KINDS = {
    "groups": layers.FanIn.random(jax.random.key(0), inputs=INPUTS, outputs=OUTPUTS, density=0.2, group=16),
    "single": layers.FanIn.random(jax.random.key(0), inputs=INPUTS, outputs=OUTPUTS, density=0.2, group=1),
    "any mask": layers.AnyMask.random(jax.random.key(0), inputs=INPUTS, outputs=OUTPUTS, density=0.2),
}


def dot(x: jax.Array, values: jax.Array, connections: Any) -> jax.Array:
    return layers.sparse_dot(x, values, connections)


def conv(x: jax.Array, values: jax.Array, connections: Any) -> jax.Array:
    return layers.sparse_conv(x, values, connections, kernel_size=3)


PRODUCTS = {"dot": (dot, (8, 3, INPUTS)), "conv": (conv, (8, 5, 4, 4))}

tx = optax.adam(0.1)


def loss_fn(params: Any, x: jax.Array, connections: Any) -> jax.Array:
    return jnp.sum(jnp.sin(layers.sparse_dot(x, params["hidden"], connections["hidden"])))


if not eight_devices.ARE_HERE:

    @pytest.mark.parametrize("part", ["Auto", "Explicit"])
    def test_on_eight_devices(part: str, pytestconfig: pytest.Config) -> None:
        eight_devices.run_tests(__file__, part, pytestconfig.rootpath)

else:

    @pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("product", PRODUCTS)
    def test_value_and_gradients_of_one_device(product: str, kind: str, axis_type: str) -> None:
        function, shape = PRODUCTS[product]
        connections = KINDS[kind]
        x = jax.random.normal(jax.random.key(1), shape)
        values = jax.random.normal(jax.random.key(2), connections.values_shape)

        def loss(x: jax.Array, values: jax.Array, connections: Any) -> tuple[jax.Array, jax.Array]:
            y = function(x, values, connections)
            return jnp.sum(jnp.sin(y)), y

        evaluate = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        expected = evaluate(x, values, connections)
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(getattr(AxisType, axis_type),) * 2)
        by_batch = NamedSharding(mesh, PartitionSpec("data"))
        by_output = NamedSharding(mesh, PartitionSpec("model" if values.ndim == 2 else None))
        with eight_devices.set_mesh(mesh):
            own = jax.device_put(connections, NamedSharding(mesh, PartitionSpec()))
            found = evaluate(jax.device_put(x, by_batch), jax.device_put(values, by_output), own)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)
        (_, y), (dx, _) = found
        if axis_type == "Explicit":
            assert dx.sharding.is_equivalent_to(by_batch, x.ndim)
            assert y.sharding.spec[0] == "data" and (kind == "any mask" or y.sharding.spec[-1] == "model")

    @pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
    @pytest.mark.parametrize("kind", ["groups", "any mask"])
    @pytest.mark.parametrize("candidates", [None, 1.0])
    def test_rewiring_of_one_device(candidates: float | None, kind: str, axis_type: str) -> None:
        connections = {"hidden": KINDS[kind]}
        x = jax.random.normal(jax.random.key(1), (8, INPUTS))
        params = {"hidden": jax.random.normal(jax.random.key(2), KINDS[kind].values_shape)}

        def rewired(params: Any, connections: Any, x: jax.Array) -> layers.Rewired:
            options: Any = {"tx": tx, "topology": agent_optax.rigl(1, 0.4), "step": 1, "key": jax.random.key(0)}
            return layers.rewire(loss_fn, params, connections, tx.init(params), x, candidates=candidates, **options)

        expected = rewired(params, connections, x)
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(getattr(AxisType, axis_type),) * 2)
        by_output = NamedSharding(mesh, PartitionSpec("model" if params["hidden"].ndim == 2 else None))
        with eight_devices.set_mesh(mesh):
            found = rewired(
                jax.device_put(params, by_output),
                jax.device_put(connections, NamedSharding(mesh, PartitionSpec())),
                jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))),
            )
        assert found.params["hidden"].sharding.is_equivalent_to(by_output, params["hidden"].ndim)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(expected))
