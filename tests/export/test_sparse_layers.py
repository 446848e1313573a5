"""Sparse layers leave as matrices and files that SciPy reads, and come back as they were."""

import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse
from jax.experimental import sparse
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import agent_optax
import agent_optax.flax
from agent_optax import export, layers

RNG = np.random.default_rng(0)
GROUPS = np.repeat(RNG.permuted(np.tile(np.arange(12) < 4, (7, 1)), axis=1), 3, axis=0).T[:, :20]  # the last of two
MASKS = {"fan_in": GROUPS, "dense_groups": np.repeat(GROUPS[:, ::3], 16, axis=1), "any": RNG.random((12, 20)) < 0.3}
KERNELS = {name: np.where(mask, RNG.normal(size=mask.shape), 0).astype(np.float32) for name, mask in MASKS.items()}
CONNECTIONS = {name: layers.connections_of(mask) for name, mask in MASKS.items()}


def values_of(name: str) -> jax.Array:
    return layers.from_dense(KERNELS[name], CONNECTIONS[name])


def assert_equal(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def assert_says(build: Any, *parts: str) -> None:
    with pytest.raises(ValueError) as raised:
        build()
    assert [part for part in parts if part not in str(raised.value)] == [], str(raised.value)


# parameters and connections apart, as `rewire` takes them; beside each other, as in a model; and as in Linen
APART = (
    {name: {"values": values_of(name)} for name in MASKS},
    {name: {"connections": CONNECTIONS[name]} for name in MASKS},
)
BESIDE = ({name: {"values": values_of(name), "connections": CONNECTIONS[name]} for name in MASKS}, None)
LINEN = ({"params": {**APART[0], "head": {"kernel": jnp.ones((2, 2))}}, "connections": APART[1]}, None)
BARE = ({name: values_of(name) for name in MASKS}, CONNECTIONS)


@pytest.mark.parametrize(("params", "connections"), [APART, BESIDE, LINEN, BARE])
def test_matrices_of_sparse_layers(params: Any, connections: Any) -> None:
    for to, back, kind in (
        (export.to_bcsr, export.from_bcsr, sparse.BCSR),
        (export.to_bcoo, export.from_bcoo, sparse.BCOO),
    ):
        sparse_params = to(params, connections)
        nodes = jax.tree_util.tree_leaves_with_path(sparse_params, is_leaf=lambda n, kind=kind: isinstance(n, kind))
        matrices = {
            next(part.key for part in path if part.key in MASKS): node for path, node in nodes if isinstance(node, kind)
        }
        assert set(matrices) == set(MASKS)
        for name, matrix in matrices.items():
            if isinstance(matrix, sparse.BCSR):
                held = scipy.sparse.csr_matrix((matrix.data, matrix.indices, matrix.indptr), matrix.shape).T
            else:
                held = scipy.sparse.coo_matrix((matrix.data, matrix.indices.T), matrix.shape)
                flat = np.ravel_multi_index(tuple(np.asarray(matrix.indices).T), matrix.shape)
                assert (np.diff(flat) > 0).all()  # as it is marked
            assert held.nnz == MASKS[name].sum()
            np.testing.assert_array_equal(held.toarray(), KERNELS[name])
        assert_equal(back(sparse_params, connections), params)


def test_bcsr_of_dense_kernels_multiplies() -> None:
    """A convolution, attention and layers that are stacked, each of whose shapes NumPy gives a matrix."""
    shapes = {"query": (6, 2, 3), "out": (2, 3, 6), "conv": (3, 3, 4, 5), "layers": (2, 6, 5), "dense": (6, 5)}
    params = {name: {"kernel": jnp.asarray(RNG.normal(size=shape), jnp.float32)} for name, shape in shapes.items()}
    params["layers"]["bias"] = jnp.zeros((2, 5))
    opt_state = agent_optax.sparsify(optax.sgd(0.1), agent_optax.static(), sparsity=0.7).init(params)
    params = agent_optax.mask_params(params, opt_state)
    masks = agent_optax.active_masks(opt_state, params)
    found = {name: layer["kernel"] for name, layer in export.to_bcsr(params, opt_state).items()}
    kernels = {name: np.asarray(layer["kernel"]) for name, layer in params.items()}
    expected = {"query": (6, 6), "out": (6, 6), "conv": (36, 5), "dense": (6, 5)}
    for name, shape in expected.items():
        matrix, kernel = found[name], kernels[name].reshape(shape)
        assert matrix.nse == masks[name]["kernel"].sum() and matrix.indices_sorted and matrix.unique_indices
        x = RNG.normal(size=(3, shape[0])).astype(np.float32)
        np.testing.assert_allclose((matrix @ x.T).T, x @ kernel, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found["layers"].todense(), kernels["layers"].swapaxes(1, 2))
    assert_equal(export.from_bcsr(export.to_bcsr(params, masks), masks), params)

    def outputs_first(name: str, shape: Any) -> agent_optax.Axes:
        return agent_optax.Axes(inputs=1, outputs=0)

    weight = {"weight": params["dense"]["kernel"].T}
    mask = {"weight": masks["dense"]["kernel"].T}
    matrix = export.to_bcsr(weight, mask, axes=outputs_first)["weight"]
    np.testing.assert_array_equal(matrix.todense(), weight["weight"])
    assert_equal(export.from_bcsr({"weight": matrix}, mask, axes=outputs_first), weight)


def read_with_scipy(path: Path) -> dict[str, np.ndarray]:
    """The kernels [inputs, outputs] of the sparse layers of a file, by its layout alone."""
    kernels = {}
    with safe_open(path, framework="np") as file:
        for name, layer in json.loads(file.metadata()["sparse_layers"]).items():
            inputs, outputs = layer["shape"]
            values, indices = file.get_tensor(f"{name}.values"), file.get_tensor(f"{name}.indices")
            if layer["kind"] == "fan_in":
                indices = np.repeat(indices, layer["group"], axis=0)[:outputs]
                indptr = np.arange(outputs + 1) * indices.shape[1]
            else:
                indptr = file.get_tensor(f"{name}.indptr")
            kernels[name] = scipy.sparse.csr_matrix(
                (values.ravel(), indices.ravel(), indptr), (outputs, inputs)
            ).T.toarray()
    return kernels


@pytest.mark.parametrize(("params", "connections"), [APART, BESIDE, LINEN, BARE])
def test_a_file_of_sparse_layers(params: Any, connections: Any, tmp_path: Path) -> None:
    path = tmp_path / "layers.safetensors"
    export.save_safetensors(path, params, connections, metadata={"step": "4"})
    kernels = read_with_scipy(path)
    assert {name.removeprefix("params/"): kernel.tolist() for name, kernel in kernels.items()} == {
        name: kernel.tolist() for name, kernel in KERNELS.items()
    }
    loaded, masks = export.load_safetensors(path, like=jax.eval_shape(lambda: params))
    assert_equal(loaded, params)
    by_name, by_place = export.load_safetensors(path)
    if connections is None:
        assert jax.tree.leaves(masks) == []
    else:
        assert_equal(by_place, masks)
        again = export.to_bcsr(by_name, by_place)  # masks with connections in the place of weights
        assert_equal(export.from_bcsr(again, by_place), params)


def test_a_file_of_dense_masked_and_sparse_layers(tmp_path: Path) -> None:
    params = {
        "sparse": {"values": values_of("any"), "bias": jnp.ones(20)},
        "pruned": {"kernel": jnp.asarray(KERNELS["any"])},
    }
    masks = {
        "sparse": {"values": CONNECTIONS["any"], "bias": None},
        "pruned": {"kernel": jnp.asarray(MASKS["any"])},
    }
    export.save_safetensors(tmp_path / "file", params, masks)
    assert set(load_file(tmp_path / "file")) == {
        "sparse.values", "sparse.indices", "sparse.indptr", "sparse/bias", "pruned/kernel", "pruned/kernel.mask",
    }  # fmt: skip
    loaded, loaded_masks = export.load_safetensors(tmp_path / "file")
    assert_equal(loaded, params)
    assert_equal(loaded_masks, masks)
    export.save_safetensors(tmp_path / "alone", BESIDE[0]["fan_in"])  # a layer alone has no name
    assert set(load_file(tmp_path / "alone")) == {".values", ".indices"}
    assert_equal(export.load_safetensors(tmp_path / "alone", BESIDE[0]["fan_in"])[0], BESIDE[0]["fan_in"])


def test_linen_variables_go_through_a_file(tmp_path: Path) -> None:
    """Of a network with dense, sparse and normalized layers; what they are loaded into has other connections."""
    net = nn.Sequential(
        [agent_optax.flax.linen.SparseDense(20, sparsity=0.7), nn.BatchNorm(use_running_average=True), nn.Dense(3)]
    )
    x = jnp.ones((2, 12))
    variables, others = (net.init(jax.random.key(seed), x) for seed in range(2))
    export.save_safetensors(tmp_path / "file", variables)
    loaded, _ = export.load_safetensors(tmp_path / "file", like=others)
    assert_equal(loaded, variables)
    kernel = read_with_scipy(tmp_path / "file")["params/layers_0"]
    first = nn.Sequential([nn.Dense(20), *net.layers[1:]])
    dense = {"layers_0": {"kernel": kernel, "bias": jnp.zeros(20)}}
    expected = first.apply({**loaded, "params": {**loaded["params"], **dense}}, x)
    np.testing.assert_allclose(net.apply(loaded, x), expected, rtol=1e-5, atol=1e-6)


CORRUPTIONS = {
    "an index out of range": ({"fan_in.indices": lambda a: a + 9}, {}, "'fan_in' of ", "between 0 and 11"),
    "indices that fall": ({"fan_in.indices": lambda a: a[:, ::-1]}, {}, "must increase"),
    "groups that do not divide": ({}, {"fan_in": {"group": 4}}, "[5, k]", "each group of 4 of the 20 outputs"),
    "an index out of range, any mask": ({"any.indices": lambda a: a - 1}, {}, "'any' of", "got -1"),
    "rows of another layer": ({"any.indptr": lambda a: a[:-1]}, {}, "indptr must rise from 0 to"),
    "weights of another layer": ({"any.values": lambda a: a[1:]}, {}, "the values have the shape"),
    "other outputs": ({}, {"any": {"shape": [12, 21]}}, "the layer has 21 outputs"),
    "an unknown kind": ({}, {"any": {"kind": "blocks"}}, "kind is 'blocks'"),
    "no indices": ({"any.indices": lambda a: None}, {}, "'any' of", "lacks 'any.indices'"),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_file_that_is_wrong(corruption: str, tmp_path: Path) -> None:
    arrays, description, *parts = CORRUPTIONS[corruption]
    export.save_safetensors(tmp_path / "right", *APART)
    tensors = load_file(tmp_path / "right")
    with safe_open(tmp_path / "right", framework="np") as file:
        described = json.loads(file.metadata()["sparse_layers"])
    for name, change in arrays.items():
        tensors[name] = change(tensors[name])
    for name, changes in description.items():
        described[name] |= changes
    kept = {name: np.ascontiguousarray(array) for name, array in tensors.items() if array is not None}
    save_file(kept, tmp_path / "wrong", metadata={"sparse_layers": json.dumps(described)})
    assert_says(lambda: export.load_safetensors(tmp_path / "wrong"), "the sparse layer", *parts)


def test_errors(tmp_path: Path) -> None:
    params, connections = APART
    path = tmp_path / "file"
    other = {**connections, "any": {"connections": layers.AnyMask.from_mask(~MASKS["any"])}}
    for to in (export.to_bcsr, export.to_bcoo, lambda *tree: export.save_safetensors(path, *tree)):
        assert_says(lambda to=to: to(params, other), "'any/values' has the shape", "those of another layer?")
        assert_says(lambda to=to: to({"a": jnp.ones(3)}, connections), "the connections at 'any/connections'", "['a']")
    rolled = {**connections, "any": {"connections": layers.AnyMask.from_mask(np.roll(MASKS["any"], 1, axis=0))}}
    for to, back in ((export.to_bcsr, export.from_bcsr), (export.to_bcoo, export.from_bcoo)):
        assert_says(
            lambda to=to, back=back: back(to(params, connections), rolled), "'any/values' has its weights in other"
        )
    matrices = export.to_bcsr(params, connections)
    for to in (export.to_bcsr, export.to_bcoo):
        assert_says(lambda to=to: to(params), "nothing tells which weights exist", "pass masks=")
    assert_says(lambda: export.from_bcsr(matrices), "nothing tells what", "pass the masks or the connections")
    kernel = {"a": jnp.ones((4, 4))}
    state = agent_optax.sparsify(optax.sgd(0.1), agent_optax.static(), sparsity=0.5).init(kernel)
    assert_says(lambda: export.from_bcsr(matrices, state), "active_masks(opt_state, params)")
    assert_says(lambda: export.to_bcsr(kernel, state), "8 inactive weights of a are not zero")
    with pytest.raises(TypeError, match=r"axes must be a function .* got 1"):
        export.to_bcsr(kernel, state, axes=1)  # type: ignore[arg-type]
    assert_says(
        lambda: export.save_safetensors(path, params, metadata={"sparse_layers": ""}), "'sparse_layers' is what"
    )

    export.save_safetensors(path, params, connections)
    wider = {**connections, "any": {"connections": layers.AnyMask.from_mask(np.ones((12, 21), bool))}}
    like = {name: {**params[name], **wider[name]} for name in MASKS}
    assert_says(
        lambda: export.load_safetensors(path, like),
        "holds 'any/values' of 12 inputs and 20 outputs", "a sparse layer of 12 and 21",
    )  # fmt: skip
    export.save_safetensors(path, params)
    assert_says(lambda: export.load_safetensors(path, BESIDE[0]), "not a sparse layer", "asks for a sparse layer of 12")
