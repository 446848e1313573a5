"""Files of safetensors: weights that other frameworks read, with the masks beside them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import agent_optax
from agent_optax.export._merge import check_inactive_are_zero, mask_of_each_leaf
from agent_optax.sparsity._leaf_names import leaf_names

MASK = ".mask"  # what is added to the name of a weight for the name of its mask


def save_safetensors(
    path: str | os.PathLike[str], params: optax.Params, masks: Any = None, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes weights, and masks beside them, to a safetensors file.

    A weight has its path for a name, ``Dense_0/kernel``; its mask, bool of the same shape, is ``Dense_0/kernel.mask``.
    Weights are whole arrays, so that whoever reads the file need know nothing of masks.

    Args:
        path: the file.
        params: a tree of arrays.
        masks: a tree like `params` of bool arrays, None where nothing is pruned, as `agent_optax.active_masks` returns;
            or the state of an optimizer that holds `agent_optax.sparsify`. Default: no masks.
        metadata: strings to strings, kept in the header of the file.

    Raises:
        ImportError: if safetensors is not installed.
        ValueError: if `masks` does not fit `params`, an inactive weight is not zero, or two names are the same.
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
    leaves = jax.tree.leaves(params)
    found = [None] * len(leaves) if masks is None else mask_of_each_leaf(params, masks)
    tensors: dict[str, np.ndarray] = {}
    for name, leaf, mask in zip(leaf_names(params), leaves, found, strict=True):
        named = {name: leaf} if mask is None else {name: leaf, name + MASK: mask}
        for key in named:
            if key in tensors or (key == name and key.endswith(MASK)):
                raise ValueError(
                    f"the name {key!r} is taken twice, or by a mask: rename that part of params, whose names are "
                    f"{', '.join(leaf_names(params))}."
                )
        if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
            raise TypeError(
                f"{name} is a random key, which no file of weights holds: pass parameters alone, of a Flax model "
                "nnx.state(model, nnx.Param)."
            )
        if mask is not None:
            check_inactive_are_zero(name, leaf, mask)
        tensors.update({key: np.asarray(jax.device_get(array), order="C") for key, array in named.items()})
    save_file(tensors, os.fspath(path), metadata={"agent_optax": agent_optax.__version__, **(metadata or {})})


def load_safetensors(path: str | os.PathLike[str], like: optax.Params | None = None) -> tuple[optax.Params, Any]:
    """Reads what `save_safetensors` wrote.

    Args:
        path: the file.
        like: a tree with the structure, shapes and dtypes that the weights should have, such as ``model.init`` makes,
            or `jax.eval_shape` of it. Default: nested dictionaries, made from the names.

    Returns:
        The weights, and the masks in a tree like them, with None where there is none: what
        ``agent_optax.sparsify(..., masks=)`` takes.

    Raises:
        ImportError: if safetensors is not installed.
        ValueError: if the file does not hold what `like` asks for.
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
    load_file = _safetensors().numpy.load_file
    tensors = {name: jnp.asarray(array) for name, array in load_file(os.fspath(path)).items()}
    masks = {name.removesuffix(MASK): array for name, array in tensors.items() if name.endswith(MASK)}
    weights = {name: array for name, array in tensors.items() if not name.endswith(MASK)}
    if like is None:
        return _nested(weights), _nested({name: masks.get(name) for name in weights})
    names, leaves, treedef = leaf_names(like), jax.tree.leaves(like), jax.tree.structure(like)
    if set(names) != set(weights):
        raise ValueError(
            f"{os.fspath(path)} lacks {sorted(set(names) - set(weights))} of like=, and holds "
            f"{sorted(set(weights) - set(names))} besides: pass parameters of the same model."
        )
    for name, leaf in zip(names, leaves, strict=True):
        array = weights[name]
        if array.shape != jnp.shape(leaf) or array.dtype != jnp.result_type(leaf):
            raise ValueError(
                f"{os.fspath(path)} holds {name!r} of shape {list(array.shape)} and dtype {array.dtype}, but like= "
                f"asks for {list(jnp.shape(leaf))} and {jnp.result_type(leaf)}: pass parameters of the same model."
            )
    return (
        treedef.unflatten([weights[name] for name in names]),
        treedef.unflatten([masks.get(name) for name in names]),
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
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "agent_optax.export writes and reads files with safetensors, which is not installed: "
            'pip install "agent-optax[export]".'
        ) from error
    return safetensors
