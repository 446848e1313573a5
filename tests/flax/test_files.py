"""A model with dense and sparse layers goes through a file, and through dense layers, and computes the same."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import agent_optax
import agent_optax.flax
from agent_optax import export
from agent_optax.flax._sparse_nnx import connections_in
from agent_optax.flax._swap_nnx import modules_of

X = jax.random.normal(jax.random.key(0), (2, 6, 6, 4))


class Net(nnx.Module):
    """What may be pruned, what may not, statistics, and random keys, which no file holds."""

    def __init__(self, seed: int, width: int = 40) -> None:
        rngs = nnx.Rngs(seed)
        self.conv = nnx.Conv(4, 32, (3, 3), strides=2, padding=((1, 0), (0, 1)), rngs=rngs)
        self.norm = nnx.BatchNorm(32, use_running_average=True, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.hidden = nnx.Linear(32, width, rngs=rngs)
        self.head = nnx.Linear(width, 5, use_bias=False, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(1, 5, decode=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.dropout(nnx.relu(self.norm(self.conv(x)))).mean(1)
        return self.attention(self.head(nnx.relu(self.hidden(x))))


@nnx.jit
def run(model: Net) -> jax.Array:
    return model(X)


@pytest.fixture(scope="module")
def pruned() -> tuple[Net, Any, jax.Array]:
    """A network pruned in groups of 8 outputs, one layer by any mask, with statistics and biases; and its output."""
    model = Net(0)
    model.norm.mean[...], model.norm.var[...] = jnp.arange(32) / 32, jnp.arange(1.0, 33)
    model.conv.bias[...] = jnp.sin(jnp.arange(32.0))
    patterns = {"conv": agent_optax.fan_in(group=8), "hidden": agent_optax.fan_in(group=8), "head": None}
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    masks = jax.tree.map(lambda p: None, params)
    for name, pattern in patterns.items():
        tx = agent_optax.sparsify(
            optax.sgd(0.1), agent_optax.static(), sparsity=0.8, pattern=pattern,
            where=agent_optax.named(f"{name}/kernel"),
        )  # fmt: skip
        masks = jax.tree.map(
            lambda new, old: old if new is None else new,
            agent_optax.active_masks(tx.init(params), params), masks, is_leaf=lambda node: node is None,
        )  # fmt: skip
    nnx.update(model, export.merge(nnx.state(model, nnx.Param), masks))
    return model, masks, run(model)


def sparse_copy(pruned: Any) -> Net:
    model = nnx.clone(pruned[0])
    agent_optax.flax.nnx.to_sparse_layers(model, pruned[1])
    return model


def kinds_of_modules(model: Net) -> list[type]:
    return [type(module) for _, module in modules_of(model)]


def kinds(model: Net) -> list[tuple[str, int]]:
    found = [model.conv, model.hidden, model.head]
    return [(type(connections_in(layer)).__name__, connections_in(layer).group) for layer in found]


def test_sparse_layers_have_the_groups_of_the_masks_and_go_back(pruned: Any) -> None:
    model, masks, expected = pruned
    sparse = sparse_copy(pruned)
    assert kinds(sparse) == [("FanIn", 8), ("FanIn", 8), ("AnyMask", 1)]
    np.testing.assert_allclose(run(sparse), expected, rtol=1e-4, atol=1e-5)
    found = agent_optax.flax.nnx.to_dense_layers(sparse)
    assert jax.tree.structure(nnx.state(sparse)) == jax.tree.structure(nnx.state(model))
    for kind in (nnx.Param, nnx.BatchStat):
        jax.tree.map(np.testing.assert_array_equal, nnx.state(sparse, kind), nnx.state(model, kind))
    np.testing.assert_array_equal(run(sparse), expected)
    tx = agent_optax.sparsify(optax.sgd(0.1), agent_optax.static(), masks=found)
    params = nnx.to_pure_dict(nnx.state(sparse, nnx.Param))
    again = agent_optax.active_masks(tx.init(params), params)
    assert jax.tree.structure(again) == jax.tree.structure(masks)
    jax.tree.map(np.testing.assert_array_equal, again, masks)


def test_one_call_saves_a_model_and_one_loads_it(pruned: Any, tmp_path: Path) -> None:
    """Into a model as its constructor builds it, and into one with sparse layers of other kinds."""
    path = tmp_path / "model.safetensors"
    sparse = sparse_copy(pruned)
    agent_optax.flax.nnx.save_safetensors(path, sparse)
    expected = run(sparse)
    other = Net(2)
    agent_optax.flax.nnx.sparse_layers(other, sparsity=0.5, group=16, rngs=nnx.Rngs(3))
    for loaded in (Net(1), other):
        masks = agent_optax.flax.nnx.load_safetensors(path, loaded)
        assert jax.tree.leaves(masks) == [] and kinds(loaded) == kinds(sparse)
        np.testing.assert_array_equal(run(loaded), expected)


def test_a_pruned_model_and_its_masks_go_through_a_file(pruned: Any, tmp_path: Path) -> None:
    model, masks, expected = pruned
    agent_optax.flax.nnx.save_safetensors(tmp_path / "file", model, masks)
    loaded = Net(1)
    found = agent_optax.flax.nnx.load_safetensors(tmp_path / "file", loaded)
    np.testing.assert_array_equal(run(loaded), expected)
    agent_optax.flax.nnx.to_sparse_layers(loaded, found)
    np.testing.assert_allclose(run(loaded), expected, rtol=1e-4, atol=1e-5)


def test_another_model_is_refused_and_stays_as_it_was(pruned: Any, tmp_path: Path) -> None:
    agent_optax.flax.nnx.save_safetensors(tmp_path / "file", sparse_copy(pruned))
    wider, deeper = Net(1, width=41), Net(1)
    deeper.last = nnx.Linear(5, 5, rngs=nnx.Rngs(0))
    sparse_wider = Net(1, width=41)
    agent_optax.flax.nnx.sparse_layers(sparse_wider, sparsity=0.5, distribution=agent_optax.uniform, rngs=nnx.Rngs(3))
    for model, message in (
        (wider, "'head' of 40 inputs and 5 outputs, the model a dense one of 41 and 5"),
        (deeper, r"lacks \['last/bias', 'last/kernel'\]"),
        (sparse_wider, "'head/values' of 40 inputs and 5 outputs .* asks for a sparse layer of 41 and 5"),
    ):
        before = nnx.clone(model)
        with pytest.raises(ValueError, match=message):
            agent_optax.flax.nnx.load_safetensors(tmp_path / "file", model)
        assert kinds_of_modules(model) == kinds_of_modules(before)
        jax.tree.map(np.testing.assert_array_equal, nnx.state(model, nnx.Param), nnx.state(before, nnx.Param))
    with pytest.raises(ValueError, match="no SparseLinear and no SparseConv"):
        agent_optax.flax.nnx.to_dense_layers(wider)
    alone = agent_optax.flax.nnx.SparseLinear(4, 4, sparsity=0.5, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"the model itself is the layer.*flax\.nnx\.Sequential"):
        agent_optax.flax.nnx.to_dense_layers(alone)
