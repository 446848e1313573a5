"""Which weights of each leaf exist: by a mask, or by the connections of a sparse layer."""

from __future__ import annotations

from typing import Any

import jax

from agent_optax.export._merge import check_inactive_are_zero, check_mask, matched_masks
from agent_optax.layers import Connections
from agent_optax.layers._sparse_layer import check_shape, connections_of_leaves, is_connections, named_layers
from agent_optax.sparsity._state import find_sparsify


def which_exist(params: Any, masks: Any) -> list[Any]:
    """For each node of `named_layers(params)` its mask, its connections, or None.

    Connections are those in `masks`, or in `params` if `masks` holds none.
    """
    nodes = named_layers(params)
    found: list[Any] = [None] * len(nodes)
    arrays = [i for i, (_, node) in enumerate(nodes) if not is_connections(node)]
    in_masks = _holds_connections(masks)
    for i, layer in connections_of_leaves([nodes[i][0] for i in arrays], masks if in_masks else params).items():
        found[arrays[i]] = layer
    if masks is None or (in_masks and not jax.tree.leaves(_without_connections(masks))):
        return found
    of_arrays = matched_masks(_without_connections(params), _without_connections(masks))
    for i, mask in zip(arrays, of_arrays, strict=True):
        found[i] = found[i] if mask is None else mask
    return found


def which_to_export(params: Any, masks: Any) -> list[Any]:
    """As `which_exist`; ValueError if without masks nothing is sparse."""
    found = which_exist(params, masks)
    if masks is None and all(which is None for which in found):
        raise ValueError(
            "nothing tells which weights exist: pass masks=, the masks, the state of the optimizer or the connections, "
            "or parameters that hold connections, as an NNX model with sparse layers does."
        )
    return found


def check_fits(name: str, weights: Any, which: Any) -> None:
    """Raises ValueError unless what `which_exist` has found goes with the weights."""
    if isinstance(which, Connections):
        check_shape(name, weights, which)
    else:
        check_mask(name, weights, which)
        check_inactive_are_zero(name, weights, which)


def named_matrices(sparse_params: Any, masks: Any, kind: type) -> tuple[list[str], list[Any], list[Any], Any]:
    """Names and nodes of a tree with sparse matrices of a kind, which weights of each exist, and its structure."""
    if find_sparsify(masks):
        raise ValueError("masks is the state of an optimizer: pass agent_optax.active_masks(opt_state, params).")
    nodes, treedef = jax.tree.flatten(
        sparse_params, is_leaf=lambda node: isinstance(node, kind) or is_connections(node)
    )
    like = treedef.unflatten([0.0 if isinstance(node, kind) else node for node in nodes])
    return [name for name, _ in named_layers(like)], nodes, which_exist(like, masks), treedef


def check_same_places(name: str, are_same: bool) -> None:
    """Raises ValueError unless the weights of a sparse matrix are where its mask or connections say."""
    if not are_same:
        raise ValueError(
            f"the sparse matrix {name!r} has its weights in other places than the mask or the connections that go with "
            "it: pass those of the same layer and of the same step."
        )


def _holds_connections(tree: Any) -> bool:
    return any(map(is_connections, jax.tree.leaves(tree, is_leaf=is_connections)))


def _without_connections(tree: Any) -> Any:
    """The tree with None in their places."""
    if not _holds_connections(tree):
        return tree
    return jax.tree.map(lambda node: None if is_connections(node) else node, tree, is_leaf=is_connections)
