"""Files of safetensors with all that an NNX model has learned."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from agent_optax import export
from agent_optax.export._merge import matched_masks
from agent_optax.export._safetensors import read_safetensors
from agent_optax.flax._sparse_nnx import ZEROS
from agent_optax.flax._swap_nnx import is_replaceable, modules_of, sparse_layer, swap
from agent_optax.layers import Connections
from agent_optax.layers._sparse_layer import is_connections, named_layers
from agent_optax.sparsity._leaf_names import leaf_names


def save_safetensors(
    path: str | os.PathLike[str], model: nnx.Module, masks: Any = None, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a model to a safetensors file: dense and sparse layers, and statistics such as those of BatchNorm.

    Names and layout are those of `agent_optax.export.save_safetensors`. Random keys and counters are left out, and
    a checkpoint is what training goes on from.

    Args:
        path: the file.
        model: the model.
        masks: masks of dense kernels, as `to_dense_layers` or `agent_optax.active_masks` returns them, or the state of
            an optimizer that holds `agent_optax.sparsify`, as `opt_state` returns it. Default None: no masks.
        metadata: strings to strings, kept in the header of the file.

    Raises:
        ImportError: if safetensors is not installed.
        ValueError: if `masks` does not fit the model, an inactive weight is not zero, or metadata have an entry
            ``sparse_layers``.
        TypeError: if metadata are no strings.

    Example:
        >>> import agent_optax.flax, jax.numpy as jnp, pathlib, tempfile
        >>> from flax import nnx
        >>> def build(seed):
        ...     rngs = nnx.Rngs(seed)
        ...     hidden = nnx.Linear(64, 32, rngs=rngs)
        ...     return nnx.Sequential(hidden, nnx.BatchNorm(32, rngs=rngs), nnx.Linear(32, 4, rngs=rngs))
        >>> model = build(0)
        >>> agent_optax.flax.nnx.sparse_layers(model, sparsity=0.8, rngs=nnx.Rngs(1))
        >>> other = build(2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     agent_optax.flax.nnx.save_safetensors(pathlib.Path(folder) / "model.safetensors", model)
        ...     masks = agent_optax.flax.nnx.load_safetensors(pathlib.Path(folder) / "model.safetensors", other)
        >>> bool(jnp.array_equal(other(jnp.ones((1, 64))), model(jnp.ones((1, 64)))))
        True
    """
    learned, params = _learned(model), nnx.state(model, nnx.Param)
    if masks is not None:  # those of parameters, and none of what else there is
        found = dict(zip(leaf_names(params), matched_masks(params, masks), strict=True))
        treedef = jax.tree.structure(learned, is_leaf=is_connections)
        masks = treedef.unflatten([found.get(name) for name, _ in named_layers(learned)])
    export.save_safetensors(path, learned, masks, metadata)


def load_safetensors(path: str | os.PathLike[str], model: nnx.Module) -> Any:
    """Reads what `save_safetensors` wrote into a model, in place.

    Where the file has a sparse layer, the model may have the dense one, which is then replaced, or a sparse one with
    any connections: the model as its constructor builds it will do. Build the optimizer afterwards.

    Args:
        path: the file.
        model: a model with the layers of that which was saved.

    Returns:
        The masks of dense kernels, a tree like the state of the model, with None where there is none: what
        ``agent_optax.sparsify(..., masks=)`` takes.

    Raises:
        ImportError: if safetensors is not installed.
        ValueError: if the file is that of another model, or a sparse layer in it is no such. The model is then as it
            was.
        FileNotFoundError: if there is no file.

    Example:
        >>> import agent_optax.flax, jax.numpy as jnp, pathlib, tempfile
        >>> from flax import nnx
        >>> model = nnx.Sequential(agent_optax.flax.nnx.SparseLinear(64, 32, sparsity=0.8, rngs=nnx.Rngs(0)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     agent_optax.flax.nnx.save_safetensors(pathlib.Path(folder) / "model.safetensors", model)
        ...     other = nnx.Sequential(nnx.Linear(64, 31, rngs=nnx.Rngs(1)))
        ...     agent_optax.flax.nnx.load_safetensors(pathlib.Path(folder) / "model.safetensors", other)
        Traceback (most recent call last):
        ValueError: ... has a sparse layer 'layers/0' of 64 inputs and 32 outputs, the model a dense one of 64 and 31...
    """
    _, found = read_safetensors(path)
    swaps = []
    for parts, layer in modules_of(model):
        name = "/".join(map(str, parts))
        connections = found.get(f"{name}/values".lstrip("/"))
        if isinstance(connections, Connections) and is_replaceable(layer):
            _check_shape(path, name, layer, connections)
            swaps.append((parts, layer, sparse_layer(layer, ZEROS, nnx.Rngs(0), connections=connections)))
    swap(model, swaps)
    try:
        loaded, masks = export.load_safetensors(path, like=_learned(model))
    except ValueError:
        swap(model, [(parts, sparse, dense) for parts, dense, sparse in swaps])
        raise
    nnx.update(model, loaded)
    return masks


def _learned(model: nnx.Module) -> nnx.State:
    return nnx.state(model, nnx.Not(nnx.RngState))


def _check_shape(path: Any, name: str, layer: Any, connections: Connections) -> None:
    *window, outputs = layer.kernel.shape
    inputs = math.prod(window)
    if (inputs, outputs) != (connections.inputs, connections.outputs):
        raise ValueError(
            f"{os.fspath(path)} has a sparse layer {name!r} of {connections.inputs} inputs and {connections.outputs} "
            f"outputs, the model a dense one of {inputs} and {outputs}: build the model that was saved."
        )
