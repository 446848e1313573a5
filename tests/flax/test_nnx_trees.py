"""A model, its state, its arrays, and what files hold: each goes into every helper, whichever the optimizer saw."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import agent_optax
import agent_optax.flax
from agent_optax import analysis, export

as_pure = nnx.as_pure if hasattr(nnx, "as_pure") else nnx.pure  # flax < 0.12.1


class Model(nnx.Module):
    """Two layers in a list, and variables that are no parameters."""

    def __init__(self) -> None:
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in range(2)])
        self.norm = nnx.BatchNorm(8, rngs=nnx.Rngs(0))


TREES = {
    "state": lambda model: nnx.state(model, nnx.Param),
    "arrays": lambda model: as_pure(nnx.state(model, nnx.Param)),
    "dictionary": lambda model: nnx.to_pure_dict(nnx.state(model, nnx.Param)),
    "model": lambda model: model,
}


def sparse_model(storage: str) -> tuple[Model, nnx.Optimizer]:
    model = Model()
    tx = agent_optax.sparsify(optax.adam(1e-3), agent_optax.rigl(5), sparsity=0.75, storage=storage)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    agent_optax.flax.nnx.mask_model(model, optimizer)
    return model, optimizer


def restarted(masks: Any, storage: str) -> list[np.ndarray]:
    """The masks of the two kernels with which a new optimizer starts."""
    model = Model()
    tx = agent_optax.sparsify(optax.adam(1e-3), agent_optax.static(), masks=masks, storage=storage)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    agent_optax.flax.nnx.mask_model(model, optimizer)
    return kernels(model) != 0


def kernels(model: Any) -> np.ndarray:
    return np.stack([np.asarray(layer.kernel[...]) for layer in model.layers])


@pytest.mark.parametrize("storage", ["dense", "compact"])
@pytest.mark.parametrize("kind", TREES)
def test_every_helper_takes_every_tree(kind: str, storage: str, tmp_path: Path) -> None:
    model, optimizer = sparse_model(storage)
    params, state = TREES[kind](model), agent_optax.flax.nnx.opt_state(optimizer)
    active = kernels(model) != 0
    summary = analysis.sparsity_summary(params, state)
    assert summary.pruned is not None and summary.pruned.num_active == 32
    assert [layer.name for layer in summary.layers if layer.num_ever_active] == ["layers/0/kernel", "layers/1/kernel"]

    assert agent_optax.diagnostics(state, params)["num_nonzero_inactive"] == 0

    masks = agent_optax.active_masks(state, params)
    assert jax.tree.structure(agent_optax.mask_params(params, state)) == jax.tree.structure(params)
    np.testing.assert_array_equal(np.stack(jax.tree.leaves(masks)), active)
    np.testing.assert_array_equal(restarted(masks, storage), active)
    assert set(export.n_m_report(masks)) == {"layers/0/kernel", "layers/1/kernel"}
    for sparse in (export.to_bcoo(params, state), export.to_bcoo(params, masks)):
        assert export.from_bcoo(sparse) is not None
    assert jax.tree.structure(export.merge(params, masks)) == jax.tree.structure(params)

    by_size = agent_optax.magnitude_masks(params, 0.75, scope="layer", distribution=agent_optax.uniform)
    np.testing.assert_array_equal(restarted(by_size, storage), np.stack(jax.tree.leaves(by_size)))

    path = tmp_path / "model.safetensors"
    export.save_safetensors(path, nnx.state(model, nnx.Param) if kind == "model" else params, state)
    loaded, loaded_masks = export.load_safetensors(path)
    np.testing.assert_array_equal(restarted(loaded_masks, storage), active)
    assert float(loaded["layers"]["0"]["kernel"].sum()) == float(model.layers[0].kernel[...].sum())


def test_an_average_is_as_sparse_as_the_network() -> None:
    model, optimizer = sparse_model("dense")
    state = agent_optax.flax.nnx.opt_state(optimizer)
    for make in TREES.values():
        average = jax.tree.map(lambda p: jnp.ones_like(p) if jnp.issubdtype(p.dtype, jnp.floating) else p, make(model))
        masked = agent_optax.mask_params(average, state)
        assert sum(float(leaf.sum()) for leaf in jax.tree.leaves(masked) if leaf.ndim == 2) == 32


def test_weights_from_a_file_go_back_into_a_model(tmp_path: Path) -> None:
    model, optimizer = sparse_model("compact")
    path = tmp_path / "model.safetensors"
    export.save_safetensors(path, nnx.state(model, nnx.Param), agent_optax.flax.nnx.opt_state(optimizer))
    fresh = Model()
    nnx.update(fresh, export.load_safetensors(path, like=nnx.state(fresh, nnx.Param))[0])
    np.testing.assert_array_equal(kernels(fresh), kernels(model))


@pytest.mark.parametrize("storage", ["dense", "compact"])
def test_masks_from_a_file_in_linen_and_bare_jax(storage: str, tmp_path: Path) -> None:
    params = nn.Dense(8).init(jax.random.key(0), jnp.ones((1, 16)))["params"]
    masks = agent_optax.magnitude_masks(params, 0.75)
    path = tmp_path / "dense.safetensors"
    export.save_safetensors(path, export.merge(params, masks), masks)
    loaded = export.load_safetensors(path)[1]
    for tree in (params, [params], nn.FrozenDict(params) if hasattr(nn, "FrozenDict") else params):
        own = [loaded] if isinstance(tree, list) else loaded
        tx = agent_optax.sparsify(optax.sgd(0.1), agent_optax.static(), masks=own, storage=storage)
        state = tx.init(tree)
        found = jax.tree.leaves(agent_optax.active_masks(state, tree))
        np.testing.assert_array_equal(found[0], masks["kernel"])


def test_errors_name_the_leaves_and_print_no_arrays() -> None:
    _, optimizer = sparse_model("dense")
    state = agent_optax.flax.nnx.opt_state(optimizer)
    other = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    messages = []
    for attempt in (
        lambda: agent_optax.active_masks(state, nnx.state(other, nnx.Param)),
        lambda: export.merge(nnx.state(other, nnx.Param), state),
        lambda: restarted({"kernel": jnp.ones((8, 8), bool)}, "dense"),
        lambda: analysis.sparsity_summary(other, state),
    ):
        with pytest.raises(ValueError, match="layers/0/kernel") as raised:
            attempt()
        messages.append(str(raised.value))
    assert all(len(message) < 400 and "Array" not in message and "PyTreeDef" not in message for message in messages)


def test_a_model_holds_random_keys_that_no_file_does(tmp_path: Path) -> None:
    model = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"is a random key.*nnx\.state\(model, nnx\.Param\)"):
        export.save_safetensors(tmp_path / "x.safetensors", model)
