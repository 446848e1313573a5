"""Equal layers share a loop: the numbers of one layer after the other, by a program that does not grow."""

import os
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import jit
from sparse_loop import train

import agent_optax
from agent_optax.sparsity._equal_layers import FEWEST_IN_A_LOOP, map_layers


@pytest.mark.parametrize("number", [0, 1, FEWEST_IN_A_LOOP - 1, FEWEST_IN_A_LOOP, FEWEST_IN_A_LOOP + 2])
def test_the_same_as_one_after_the_other(number: int) -> None:
    """Layers of two shapes, two dtypes and two kinds, in turn."""
    rng = np.random.default_rng(0)
    shapes, dtypes = [(3, 2), (4,)], [jnp.float32, jnp.int32]
    layers = [
        (jnp.asarray(10 * rng.normal(size=shapes[i % 2]), dtypes[i // 2 % 2]), jnp.ones(i % 2))
        for i in range(4 * number)
    ]
    kinds = [("a", "b")[i % 3 == 0] for i in range(4 * number)]
    factors = jnp.asarray(rng.normal(size=4 * number), jnp.float32)

    def function(kind: str, layer: Any, factor: jax.Array) -> Any:
        x = layer[0] * (1 if kind == "a" else 2) + factor
        return {"x": x, "none": None}, jnp.sum(x > 0, dtype=jnp.int32)

    outputs, total = jit(lambda layers: map_layers(function, kinds, layers, factors))(layers)
    expected = [function(*args) for args in zip(kinds, layers, factors, strict=True)]
    chex.assert_trees_all_close(outputs, [output for output, _ in expected], rtol=1e-6)
    assert total is None if number == 0 else int(total) == sum(int(count) for _, count in expected)


def network(depth: int, width: int = 8) -> dict[str, Any]:
    key = jax.random.key(0)
    return {f"{i:03d}": jax.random.normal(jax.random.fold_in(key, i), (width, width)) for i in range(depth)}


def program(depth: int, storage: str) -> str:
    """Of a step, as XLA compiles it."""
    tx = agent_optax.sparsify(optax.sgd(0.1, momentum=0.9), agent_optax.rigl(), sparsity=0.5, storage=storage)
    params = network(depth)
    opt_state = jax.eval_shape(tx.init, params)
    # As users have it: the tests turn this off, where there is such an option, and scatters become loops.
    options = {"xla_cpu_use_fusion_emitters": True} if "fusion_emitters" in os.environ["XLA_FLAGS"] else None
    update = jax.jit(tx.update, compiler_options=options)
    return update.lower(params, opt_state, params).compile().as_text()


@pytest.mark.parametrize("storage", ["dense", "compact"])
def test_a_deeper_network_has_as_many_sorts_and_loops(storage: str) -> None:
    """What is expensive to compile stands once in the program; a layer more adds a few lines."""
    four, twelve = (program(depth, storage) for depth in (4, 12))
    for operation in (r" while\(", r" sort\(", r" conditional\("):
        few, many = (len(re.findall(operation, text)) for text in (four, twelve))
        assert many == few, operation
    few, many = (len(text.splitlines()) for text in (four, twelve))
    assert many - few < 8 * 0.1 * len(program(1, storage).splitlines())


@pytest.mark.parametrize("storage", ["dense", "compact"])
def test_a_layer_among_many_changes_as_it_does_alone(storage: str) -> None:
    """RigL draws no random numbers: each of the layers gets what it gets in a network of its own."""
    params = network(FEWEST_IN_A_LOOP + 1)
    masks = jax.tree.map(lambda p: p > 0.2, params)
    grads = jax.tree.map(jnp.sin, network(FEWEST_IN_A_LOOP + 2))

    def run(params: Any) -> Any:
        own = {name: masks[name] for name in params}
        tx = agent_optax.sparsify(optax.adam(0.1), agent_optax.rigl(2), masks=own, storage=storage)
        return train(tx, params, lambda params, step: {name: grads[name] for name in params}, num_steps=3)[0]

    together = run(params)
    alone = {name: run({name: params[name]})[name] for name in ("000", "003")}
    chex.assert_trees_all_close({name: together[name] for name in alone}, alone, rtol=1e-6)
