"""The sparse layers of a network: which weights go with which connections."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from agent_optax.layers._connections import Connections
from agent_optax.sparsity._leaf_names import leaf_names, path_name
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
    index = {f"/{name}".removesuffix("/values"): i for i, name in enumerate(names)}
    layers = []
    for path, node in jax.tree_util.tree_leaves_with_path(connections, is_leaf=is_connections):
        if not is_connections(node):
            continue
        place = path_name(path)
        name = f"/{place}".removesuffix("/connections")
        if name not in index:
            raise ValueError(
                f"the connections at {place!r} go with the parameter {name[1:]!r} or {f'{name}/values'[1:]!r}, and the "
                f"parameters are {names}."
            )
        leaf = index[name]
        if jnp.shape(leaves[leaf]) != node.values_shape:
            raise ValueError(
                f"the parameter {names[leaf]!r} has the shape {list(jnp.shape(leaves[leaf]))}, but the connections at "
                f"{place!r} have weights of shape {list(node.values_shape)}: are these those of another layer?"
            )
        if any(layer.leaf == leaf for layer in layers):
            raise ValueError(f"two of the connections go with the parameter {names[leaf]!r}: leave one of them out.")
        layers.append(SparseLayer(names[leaf], leaf, node, leaves[leaf]))
    if not layers:
        raise ValueError("connections holds none: pass a tree of those that agent_optax.layers.FanIn.random makes.")
    check_sizes({layer.name: layer.connections.inputs * layer.connections.outputs for layer in layers}, False)
    return layers
