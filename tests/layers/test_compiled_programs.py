"""What XLA makes of a network of sparse layers: features stay first from its inputs to its outputs.

The layers ask for that layout only inside. That XLA keeps it in between, rather than transpose at each layer, is its
own choice, and this test notices when it chooses otherwise.
"""

import re

import jax
import jax.numpy as jnp
import pytest
from layers_of_each_kind import connect

from agent_optax import layers

BATCH, WIDTH = 24, 40


@pytest.mark.parametrize("kind", ["fan_in:16", "fan_in:1", "any_mask"])
def test_a_network_transposes_its_inputs_once(kind):
    connections = [connect(kind, WIDTH, WIDTH, seed=seed) for seed in range(3)]

    def loss_fn(params, x):
        for (values, bias), c in zip(params, connections, strict=True):
            x = jax.nn.relu(layers.sparse_dot(x, values, c) + bias)
        return jnp.sum(x**2)

    params = [(jax.ShapeDtypeStruct(c.values_shape, "float32"), jnp.zeros(WIDTH)) for c in connections]
    x = jax.ShapeDtypeStruct((BATCH, WIDTH), "float32")
    text = jax.jit(jax.grad(loss_fn)).lower(params, x).compile().as_text()
    made = re.findall(rf"= f32\[{BATCH},{WIDTH}\]\{{1,0\}} ([\w-]+)\(", text[text.index("\nENTRY ") :])
    assert made == ["parameter"]  # batch first, and contiguous so: the inputs alone
    assert re.findall(rf"= f32\[{WIDTH},{BATCH}\]\{{0,1\}} (?!bitcast|transpose)([\w-]+)\(", text) == []
