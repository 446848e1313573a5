"""Files of safetensors: weights that other frameworks read, with masks and connections beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import agent_optax
from agent_optax.export._condensed import condensed, uncondensed
from agent_optax.export._which_exist import check_fits, which_exist
from agent_optax.layers import Connections
from agent_optax.layers._sparse_layer import connections_of_leaves, is_connections, named_layers

MASK = ".mask"  # what is added to the name of a weight for the name of its mask
SPARSE_LAYERS = "sparse_layers"  # what describes them in the metadata


def save_safetensors(
    path: str | os.PathLike[str], params: optax.Params, masks: Any = None, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes weights, and masks or connections beside them, to a safetensors file.

    A weight has its path for a name, ``Dense_0/kernel``; its mask, bool of the same shape, is ``Dense_0/kernel.mask``.
    Weights are whole arrays, so that whoever reads the file need know nothing of masks.

    Of a sparse layer only the weights that exist are written. The layer at ``layers/0`` has

    - ``layers/0.values`` [outputs, k] and ``layers/0.indices``, int32 [groups, k], for groups of G outputs with the
      same k inputs: output o has the inputs ``indices[o // G]``;
    - ``layers/0.values`` [N], ``layers/0.indices``, int32 [N], and ``layers/0.indptr``, int32 [outputs + 1], for any
      mask: output o has the inputs ``indices[indptr[o]:indptr[o + 1]]``, as in a CSR matrix [outputs, inputs];

    and the entry ``sparse_layers`` of the metadata is JSON that describes each: ``{"layers/0": {"kind": "fan_in",
    "parameter": "layers/0/values", "shape": [inputs, outputs], "group": 16}}``, or of the kind ``"any_mask"``, without
    a group. The inputs of a convolution are height, width and channels in.

    Args:
        path: the file.
        params: a tree of arrays. With sparse layers also one that holds their connections: the state of an NNX model,
            for which see `agent_optax.flax.nnx.save_safetensors`, or all variables of a Linen one.
        masks: a tree like `params` of bool arrays, None where nothing is pruned, as `agent_optax.active_masks` returns;
            or the state of an optimizer that holds `agent_optax.sparsify`; or a tree of the connections of sparse
            layers, as `agent_optax.layers.rewire` takes it. Default None: no masks, and the connections in `params`.
        metadata: strings to strings, kept in the header of the file.

    Raises:
        ImportError: if safetensors is not installed.
        ValueError: if `masks` does not fit `params`, an inactive weight is not zero, two names are the same, or
            metadata have an entry ``sparse_layers``.
        TypeError: if metadata are no strings, or `params` holds a random key.

    Example:
        >>> import agent_optax, jax.numpy as jnp, optax, pathlib, tempfile
        >>> from agent_optax import export
        >>> params = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}
        >>> opt_state = agent_optax.sparsify(optax.sgd(0.1), agent_optax.static(), sparsity=0.75).init(params)
        >>> params = agent_optax.mask_params(params, opt_state)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export.save_safetensors(pathlib.Path(folder) / "model.safetensors", params, opt_state)
        ...     loaded, masks = export.load_safetensors(pathlib.Path(folder) / "model.safetensors")
        >>> int(masks["kernel"].sum()), masks["bias"], float(loaded["kernel"].sum())
        (4, None, 4.0)
    """
    save_file = _safetensors().numpy.save_file
    for key, text in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise TypeError(f"metadata must be strings, got {key!r}: {text!r}; write numbers as str(number).")
        if key == SPARSE_LAYERS:
            raise ValueError(f"the metadata {key!r} is what describes sparse layers: choose another name for {text!r}.")
    tensors: dict[str, np.ndarray] = {}
    layers: dict[str, Any] = {}
    for (name, leaf), which in zip(named_layers(params), which_exist(params, masks), strict=True):
        if is_connections(leaf):
            continue
        if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
            raise TypeError(
                f"{name} is a random key, which no file of weights holds: pass parameters alone, of a Flax model "
                "nnx.state(model, nnx.Param)."
            )
        named = {name: leaf}
        if which is not None:
            check_fits(name, leaf, which)
            if isinstance(which, Connections):
                layer, named, layers[layer] = condensed(name, leaf, which)
            else:
                named[name + MASK] = which
        for key in named:
            if key in tensors or (key == name and key.endswith(MASK)):
                raise ValueError(
                    f"the name {key!r} is taken twice, or by a mask: rename that part of params, whose names are "
                    f"{', '.join(name for name, _ in named_layers(params))}."
                )
        tensors.update({key: np.asarray(jax.device_get(array), order="C") for key, array in named.items()})
    described = {SPARSE_LAYERS: json.dumps(layers)} if layers else {}
    header = {"agent_optax": agent_optax.__version__, **described, **(metadata or {})}
    save_file(tensors, os.fspath(path), metadata=header)


def load_safetensors(path: str | os.PathLike[str], like: optax.Params | None = None) -> tuple[optax.Params, Any]:
    """Reads what `save_safetensors` wrote.

    Args:
        path: the file.
        like: a tree with the structure, shapes and dtypes that the weights should have, such as ``model.init`` makes,
            or `jax.eval_shape` of it. Connections that it holds may be of another kind and number of weights than those
            of the file, but not of other numbers of inputs and outputs. Default: nested dictionaries, made from the
            names.

    Returns:
        The weights, and the masks in a tree like them, with None where there is none: what
        ``agent_optax.sparsify(..., masks=)`` takes. The connections of sparse layers are where `like` has them, or else
        in the masks, in the place of their weights.

    Raises:
        ImportError: if safetensors is not installed.
        ValueError: if the file does not hold what `like` asks for, or a sparse layer in it is no such: an index is out
            of range, say.
        FileNotFoundError: if there is no file.

    Example:
        >>> import jax.numpy as jnp, pathlib, tempfile
        >>> from agent_optax import export
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export.save_safetensors(pathlib.Path(folder) / "m.safetensors", [jnp.ones(2), jnp.zeros(3)])
        ...     loaded, masks = export.load_safetensors(pathlib.Path(folder) / "m.safetensors", like=[jnp.ones(2)] * 2)
        Traceback (most recent call last):
        ValueError: ... holds '1' of shape [3] and dtype float32, but like= asks for [2] and float32...
    """
    weights, found = read_safetensors(path)
    if like is None:
        return _nested(weights), _nested({name: found.get(name) for name in weights})
    nodes, treedef = named_layers(like), jax.tree.structure(like, is_leaf=is_connections)
    names = [name for name, node in nodes if not is_connections(node)]
    if set(names) != set(weights):
        raise ValueError(
            f"{os.fspath(path)} lacks {sorted(set(names) - set(weights))} of like=, and holds "
            f"{sorted(set(weights) - set(names))} besides: pass parameters of the same model."
        )
    own = {names[leaf]: connections for leaf, connections in connections_of_leaves(names, like).items()}
    for name, leaf in nodes:
        if not is_connections(leaf):
            _check_like(os.fspath(path), name, weights[name], found.get(name), leaf, own.get(name))
    connections = iter([found.pop(name) for name in own])  # in the order in which like has them
    loaded = [next(connections) if is_connections(node) else weights[name] for name, node in nodes]
    return treedef.unflatten(loaded), treedef.unflatten([found.get(name) for name, _ in nodes])


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """Weights by their names, and the mask or the connections of each that has one."""
    with _safetensors().safe_open(os.fspath(path), framework="np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        layers = json.loads((file.metadata() or {}).get(SPARSE_LAYERS, "{}"))
    found: dict[str, Any] = {}
    weights: dict[str, Any] = {}
    for layer, description in layers.items():
        name, values, connections = uncondensed(os.fspath(path), layer, description, tensors)
        weights[name], found[name] = values, connections
    weights |= {name: array for name, array in tensors.items() if not name.endswith(MASK)}
    found |= {name.removesuffix(MASK): jnp.asarray(mask) for name, mask in tensors.items() if name.endswith(MASK)}
    return {name: jnp.asarray(array) for name, array in weights.items()}, found


def _check_like(path: str, name: str, array: jax.Array, which: Any, leaf: Any, own: Connections | None) -> None:
    """Raises ValueError unless a file holds what a leaf, with its own connections if there are such, asks for."""
    held, asked = f"shape {list(array.shape)}", f"{list(jnp.shape(leaf))}"
    is_same = array.shape == jnp.shape(leaf)
    if own is not None:
        is_sparse = isinstance(which, Connections)
        held = f"{which.inputs} inputs and {which.outputs} outputs" if is_sparse else held + ", not a sparse layer,"
        asked = f"a sparse layer of {own.inputs} and {own.outputs}"
        is_same = is_sparse and (which.inputs, which.outputs) == (own.inputs, own.outputs)
    if not is_same or array.dtype != jnp.result_type(leaf):
        raise ValueError(
            f"{path} holds {name!r} of {held} and dtype {array.dtype}, but like= asks for {asked} and "
            f"{jnp.result_type(leaf)}: pass parameters of the same model."
        )


def _nested(named: dict[str, Any]) -> Any:
    """Nested dictionaries from names with slashes; an array alone has the empty name."""
    if set(named) == {""}:
        return named[""]
    tree: dict[str, Any] = {}
    for name, leaf in named.items():
        *folders, last = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = leaf
    return tree


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "agent_optax.export writes and reads files with safetensors, which is not installed: "
            'pip install "agent-optax[export]".'
        ) from error
    return safetensors
