"""Sparse layers as plain arrays: their weights, and where those are."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from agent_optax.export._compressed_rows import compressed_rows
from agent_optax.layers import AnyMask, Connections, FanIn

VALUES, INDICES, INDPTR = ".values", ".indices", ".indptr"  # what is added to the name of a layer


def condensed(name: str, values: Any, connections: Connections) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The name of the layer whose weights have this name, its arrays by their names, and what describes them."""
    layer = "" if name == "values" else name.removesuffix("/values")
    description: dict[str, Any] = {
        "kind": "any_mask",
        "parameter": name,
        "shape": [connections.inputs, connections.outputs],
    }
    if isinstance(connections, FanIn):
        description |= {"kind": "fan_in", "group": connections.group}
        return layer, {layer + VALUES: values, layer + INDICES: connections.indices}, description
    indices, indptr = compressed_rows(connections)
    return layer, {layer + VALUES: values, layer + INDICES: indices, layer + INDPTR: indptr}, description


def uncondensed(
    path: str, layer: str, description: dict[str, Any], tensors: dict[str, np.ndarray]
) -> tuple[str, np.ndarray, Connections]:
    """The inverse: the name of the weights, the weights, and their connections. Takes the arrays out of `tensors`."""
    try:
        values, indices = tensors.pop(layer + VALUES), tensors.pop(layer + INDICES)
        kind, (inputs, outputs) = description["kind"], description["shape"]
        if kind == "fan_in":
            _check_increasing(indices)
            group = description["group"]
            connections: Connections = FanIn.from_indices(indices, inputs=inputs, outputs=outputs, group=group)
        elif kind == "any_mask":
            connections = AnyMask.from_indices(indices, tensors.pop(layer + INDPTR), inputs=inputs)
        else:
            raise ValueError(f"kind is {kind!r}, and not 'fan_in' or 'any_mask': a later agent_optax may read it.")
        if (connections.outputs, jnp.shape(values)) != (outputs, connections.values_shape):
            raise ValueError(
                f"the values have the shape {list(jnp.shape(values))} and the indices that of {connections.outputs} "
                f"outputs and values {list(connections.values_shape)}; the layer has {outputs} outputs."
            )
        return description["parameter"], values, connections
    except KeyError as error:
        raise ValueError(f"the sparse layer {layer!r} of {path} lacks {error.args[0]!r}.") from error
    except ValueError as error:
        raise ValueError(f"the sparse layer {layer!r} of {path} is not one that can be read: {error}") from error


def _check_increasing(indices: np.ndarray) -> None:
    if indices.ndim == 2 and (indices[:, 1:] < indices[:, :-1]).any():
        raise ValueError("the indices of a group must increase; sort them, and the values with them.")
