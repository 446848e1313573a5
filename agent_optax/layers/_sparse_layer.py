"""The sparse layers of a network: which weights go with which connections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from agent_optax.layers._connections import Connections
from agent_optax.sparsity._leaf_names import leaf_names, named_boxes
from agent_optax.sparsity._where import check_sizes


class SparseLayer(NamedTuple):
    """A sparse layer of a network."""

    name: str  # of its weights
    leaf: int  # which of the leaves of the parameters they are
    connections: Connections
    values: jax.Array  # the weights


def is_connections(node: Any) -> bool:
    """Whether a node of a tree is the connections of a layer."""
    return isinstance(node, Connections)


def connections_in(tree: Any) -> list[Connections]:
    """Those of each layer, in order."""
    return [node for node in jax.tree.leaves(tree, is_leaf=is_connections) if is_connections(node)]


def sparse_layers_of(params: optax.Params, connections: Any) -> list[SparseLayer]:
    """Each of the connections and its weights, told by their names."""
    leaves, names = jax.tree.leaves(params), leaf_names(params)
    layers = []
    for leaf, node in connections_of_leaves(names, connections).items():
        check_shape(names[leaf], leaves[leaf], node)
        layers.append(SparseLayer(names[leaf], leaf, node, leaves[leaf]))
    if not layers:
        raise ValueError("connections holds none: pass a tree of those that agent_optax.layers.FanIn.random makes.")
    check_sizes({layer.name: layer.connections.inputs * layer.connections.outputs for layer in layers}, False)
    return layers


def named_layers(tree: Any) -> list[tuple[str, Any]]:
    """The names of the leaves and the leaves, of which connections are one each."""
    return [
        (name, node)
        for name, box in named_boxes(tree, is_connections)
        for node in jax.tree.leaves(box, is_leaf=is_connections)
    ]


def connections_of_leaves(names: Sequence[str], connections: Any) -> dict[int, Connections]:
    """For each leaf of these names that are the weights of a sparse layer its connections, in their order."""
    index = {name: i for i, name in enumerate(names)}
    found: dict[int, Connections] = {}
    for place, node in named_layers(connections):
        if not is_connections(node):
            continue
        in_params = f"params/{place.removeprefix('connections/')}"  # of the variables of Linen
        own, beside, in_linen = (f"/{p}".removesuffix("/connections") for p in (place, place, in_params))
        candidates = [own[1:], f"{beside}/values"[1:], f"{in_linen}/values"[1:]]
        leaf = next((index[name] for name in candidates if name in index), None)
        if leaf is None:
            raise ValueError(
                f"the connections at {place!r} go with the parameter {candidates[0]!r} or {candidates[1]!r}, and the "
                f"parameters are {list(names)}."
            )
        if leaf in found:
            raise ValueError(f"two of the connections go with the parameter {names[leaf]!r}: leave one of them out.")
        found[leaf] = node
    return found


def check_shape(name: str, values: Any, connections: Connections) -> None:
    """Raises ValueError unless a parameter has the shape of the weights of its connections."""
    if jnp.shape(values) != connections.values_shape:
        raise ValueError(
            f"the parameter {name!r} has the shape {list(jnp.shape(values))}, but its connections have weights of "
            f"shape {list(connections.values_shape)}: are these those of another layer?"
        )
