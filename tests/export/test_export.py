"""What is exported is loaded back equal, and computes the same."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.experimental import sparse

import agent_optax
from agent_optax import export


def loss_fn(params: optax.Params, batch: jax.Array) -> jax.Array:
    hidden = jnp.tanh(jnp.einsum("bi,ijk->bjk", batch, params["hidden"]["kernel"]) + params["hidden"]["bias"])
    return jnp.mean((jnp.einsum("bjk,jk->b", hidden, params["output"]["kernel"]) - batch[:, 0]) ** 2)


def trained(storage: str = "compact", dtype: Any = jnp.float32) -> tuple[optax.Params, optax.OptState]:
    rng = np.random.default_rng(0)
    params = {
        "hidden": {"kernel": jnp.asarray(rng.normal(size=(6, 4, 2)), dtype), "bias": jnp.zeros((4, 2), dtype)},
        "output": {"kernel": jnp.asarray(rng.normal(size=(4, 2)), dtype)},
    }
    tx = agent_optax.sparsify(optax.adam(0.05), agent_optax.rigl(update_every=2), sparsity=0.6, storage=storage)
    opt_state = tx.init(params)
    params = agent_optax.mask_params(params, opt_state)
    batch = jnp.asarray(rng.normal(size=(16, 6)), dtype)

    @jax.jit
    def step(params: Any, opt_state: Any) -> Any:
        updates, opt_state = tx.update(jax.grad(loss_fn)(params, batch), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for _ in range(4):  # the last is a topology update: weights that were grown in it are active, and 0.0
        params, opt_state = step(params, opt_state)
    return params, opt_state


@pytest.fixture(scope="module")
def network() -> tuple[optax.Params, optax.OptState]:
    return trained()


def assert_equal(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert jnp.result_type(a) == jnp.result_type(b)
        np.testing.assert_array_equal(a, b)


def test_bcoo_holds_the_active_weights(network: Any) -> None:
    params, opt_state = network
    masks = agent_optax.active_masks(opt_state, params)
    for given in (opt_state, masks):
        sparse_params = export.to_bcoo(params, given)
        assert sparse_params["hidden"]["bias"] is params["hidden"]["bias"]
        for layer in ("hidden", "output"):
            matrix, mask = sparse_params[layer]["kernel"], masks[layer]["kernel"]
            assert isinstance(matrix, sparse.BCOO) and matrix.indices_sorted and matrix.unique_indices
            assert matrix.nse == int(mask.sum()) and matrix.indices.dtype == jnp.int32
            held = np.zeros(matrix.shape, bool)
            held[tuple(np.asarray(matrix.indices).T)] = True
            np.testing.assert_array_equal(held, mask)
        assert_equal(export.from_bcoo(sparse_params), params)
    grown = sum(int((masks[layer]["kernel"] & (params[layer]["kernel"] == 0)).sum()) for layer in params)
    assert grown == int(agent_optax.diagnostics(opt_state)["num_grown"]) > 0  # zeros that are held


def test_bcoo_takes_part_in_products(network: Any) -> None:
    params, opt_state = network
    kernel = export.to_bcoo(params, opt_state)["output"]["kernel"]
    x = jax.random.normal(jax.random.key(0), (5, 4))
    np.testing.assert_allclose(jax.jit(lambda k: x @ k)(kernel), x @ params["output"]["kernel"], rtol=1e-5, atol=1e-6)


def test_merge(network: Any) -> None:
    params, opt_state = network
    masks = agent_optax.active_masks(opt_state, params)
    spoilt = jax.tree.map(lambda p, m: p if m is None else jnp.where(m, p, jnp.nan), params, masks)
    assert_equal(export.merge(spoilt, masks), params)
    assert_equal(export.merge(spoilt, opt_state), params)
    assert_equal(export.merge(params, jax.tree.map(lambda p: None, params)), params)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_safetensors(dtype: Any, network: Any, tmp_path: Path) -> None:
    params, opt_state = network
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    masks = agent_optax.active_masks(opt_state, params)
    path = tmp_path / "network.safetensors"
    export.save_safetensors(path, params, opt_state, metadata={"step": "4"})
    for like in (None, params, jax.eval_shape(lambda: params)):
        loaded, loaded_masks = export.load_safetensors(path, like)
        assert_equal(loaded, params)
        assert_equal(loaded_masks, masks)
    restarted = agent_optax.sparsify(optax.sgd(0.1), agent_optax.static(), masks=loaded_masks).init(loaded)
    assert_equal(agent_optax.active_masks(restarted, loaded), masks)

    from safetensors import safe_open  # another reader, as other frameworks have

    with safe_open(path, framework="np") as file:
        names = {"hidden/kernel", "hidden/kernel.mask", "hidden/bias", "output/kernel", "output/kernel.mask"}
        assert set(file.keys()) == names
        assert file.metadata() == {"step": "4", "agent_optax": agent_optax.__version__}


@pytest.mark.parametrize(
    "params", [[jnp.ones(2), {"a": jnp.zeros((2, 3), jnp.int32)}], jnp.arange(3.0), (jnp.ones(()),)]
)
def test_safetensors_of_other_trees(params: Any, tmp_path: Path) -> None:
    export.save_safetensors(str(tmp_path / "tree"), params)
    loaded, masks = export.load_safetensors(tmp_path / "tree", like=params)
    assert_equal(loaded, params)
    assert jax.tree.leaves(masks) == []
    if isinstance(params, jax.Array):
        assert_equal(export.load_safetensors(tmp_path / "tree")[0], params)


def test_a_model_of_nnx_goes_through(tmp_path: Path) -> None:
    model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    tx = agent_optax.sparsify(optax.sgd(0.1), agent_optax.static(), sparsity=0.75)
    state = nnx.state(model, nnx.Param)
    opt_state = tx.init(state)
    state = export.merge(state, opt_state)
    export.save_safetensors(tmp_path / "linear", state, opt_state)
    loaded, masks = export.load_safetensors(tmp_path / "linear", like=state)
    assert_equal(loaded, state)
    assert int(masks["kernel"].get_value().sum()) == 4
    by_name, _ = export.load_safetensors(tmp_path / "linear")
    assert set(by_name) == {"kernel", "bias"}
    assert_equal(export.from_bcoo(export.to_bcoo(state, opt_state)), state)


def test_n_m() -> None:
    two_of_four = np.array([[1, 0, 1], [1, 1, 0], [0, 1, 1], [0, 0, 0]], bool)  # [in, out]
    assert export.is_n_m(two_of_four) and export.is_n_m(np.tile(two_of_four, (3, 1)))
    column = np.array([[0], [0], [1], [1], [1], [0], [0], [0]])
    assert export.is_n_m(column) and not export.is_n_m(np.roll(column, -2, axis=0))  # groups start at multiples of m
    assert export.is_n_m(two_of_four.T, axis=-1) and not export.is_n_m(two_of_four.T)  # 3 is no multiple of 4
    assert not export.is_n_m(two_of_four, n=1) and export.is_n_m(two_of_four, n=2, m=2)
    assert not export.is_n_m(two_of_four, n=1, m=2)
    assert export.is_n_m(np.zeros((4, 2))) and not export.is_n_m(np.ones((4, 2)))
    filters = np.zeros((3, 3, 8, 2), bool)
    filters[..., ::2, :] = True
    assert export.is_n_m(filters) and export.is_n_m(filters * 0.5, n=1, m=2)  # weights count where they are not 0
    assert not export.is_n_m(filters, axis=0)


def test_n_m_report_names_the_layers() -> None:
    mask = np.ones((8, 3), bool)
    mask[:2], mask[4:6] = False, False
    mask[0, 1] = True
    report = export.n_m_report({"a": {"kernel": jnp.asarray(mask), "bias": None}, "b": jnp.ones((6, 2))})
    assert report == {
        "a/kernel": export.NMReport(is_n_m=False, num_groups=6, num_too_dense=1, density=13 / 24),
        "b": export.NMReport(is_n_m=False, num_groups=0, num_too_dense=0, density=1.0),
    }


PARAMS = {"a": jnp.ones((4, 4)), "b": jnp.ones(4)}
MASKS = {"a": jnp.eye(4, dtype=bool), "b": None}


@pytest.mark.parametrize(
    ("mistake", "error", "parts"),
    [
        (lambda path: export.to_bcoo(PARAMS, MASKS), ValueError, ("12 inactive weights of a", "export.merge")),
        (lambda path: export.save_safetensors(path, PARAMS, MASKS), ValueError, ("12 inactive weights of a",)),
        (
            lambda path: export.merge(PARAMS, {"a": None}),
            ValueError,
            ("params has a, b; masks has a.",),
        ),
        (lambda path: export.merge(PARAMS, {"a": MASKS, "b": None}), ValueError, ("tree like params",)),
        (
            lambda path: export.merge(PARAMS, {"a": jnp.ones((4, 4)), "b": None}),
            ValueError,
            ("for a the mask is float32[4, 4]", "mask != 0"),
        ),
        (
            lambda path: export.merge(PARAMS, {"a": jnp.ones((2, 4), bool), "b": None}),
            ValueError,
            ("bool[2, 4] and the weight [4, 4]",),
        ),
        (
            lambda path: export.save_safetensors(path, {"a": jnp.ones(2), "a.mask": jnp.ones(2)}),
            ValueError,
            ("'a.mask' is taken twice, or by a mask", "rename"),
        ),
        (
            lambda path: export.save_safetensors(path, {"a": {"b": jnp.ones(2)}, "a/b": jnp.ones(2)}),
            ValueError,
            ("'a/b' is taken twice",),
        ),
        (
            lambda path: export.save_safetensors(path, PARAMS, metadata={"step": 4}),
            TypeError,
            ("'step': 4", "str(number)"),
        ),
        (lambda path: export.load_safetensors(path.parent / "none"), FileNotFoundError, ("none",)),
        (
            lambda path: (export.save_safetensors(path, PARAMS), export.load_safetensors(path, {"c": jnp.ones(2)})),
            ValueError,
            ("lacks ['c']", "holds ['a', 'b'] besides"),
        ),
        (
            lambda path: (
                export.save_safetensors(path, PARAMS),
                export.load_safetensors(path, {**PARAMS, "b": jnp.ones(4, jnp.bfloat16)}),
            ),
            ValueError,
            ("holds 'b' of shape [4] and dtype float32", "[4] and bfloat16"),
        ),
        (lambda path: export.is_n_m(MASKS["a"], 0), ValueError, ("n must be", "got 0")),
        (lambda path: export.is_n_m(MASKS["a"], 2, 4.0), ValueError, ("m must be", "got 4.0")),
        (lambda path: export.is_n_m(MASKS["a"], 4, 2), ValueError, ("got n=4 and m=2",)),
        (lambda path: export.is_n_m(jnp.ones(4)), ValueError, ("axis=-2 is none of mask, which has shape [4]",)),
        (lambda path: export.n_m_report({"b": None}), ValueError, ("active_masks(opt_state, params)",)),
    ],
)
def test_message(mistake: Any, error: type[Exception], parts: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(error) as raised:
        mistake(tmp_path / "file")
    assert [part for part in parts if part not in str(raised.value)] == [], str(raised.value)


def test_core_needs_neither_flax_nor_safetensors() -> None:
    """Both are extras: importing the package, or export, imports none of them; using them without says what to do."""
    program = """
import sys
sys.modules.update({name: None for name in ("flax", "safetensors", "orbax")})
import agent_optax
import agent_optax.export
try:
    agent_optax.export.save_safetensors("never", {})
except ImportError as error:
    print(error)
try:
    import agent_optax.flax
except ImportError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r'pip install "agent-optax\[export\]"', done.stdout)
    assert re.search(r'pip install "agent-optax\[flax\]"', done.stdout)
