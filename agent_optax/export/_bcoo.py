"""Sparse matrices of `jax.experimental.sparse` by coordinates."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import sparse

from agent_optax.export._which_exist import check_fits, check_same_places, named_matrices, which_to_export
from agent_optax.layers import Connections
from agent_optax.layers._sparse_layer import is_connections, named_layers


def to_bcoo(params: optax.Params, masks: Any = None) -> Any:
    """Pruned leaves as sparse arrays that hold the active weights only.

    What a mask says is kept: an active weight is held even where it is 0.0, as a weight that has just been grown is.
    Positions are sorted and distinct, and marked so. A sparse matrix takes part in products, ``x @ kernel``, under
    `jax.experimental.sparse.sparsify` or as it is.

    On a CPU that product is slow: with 2048 x 2048 weights and a batch of 128 it takes 18, 10 and 1.5 times as long as
    the dense one at 90, 95 and 99%, where that of `to_bcsr` takes 0.47, 0.22 and 0.09 of it (see the results).

    Args:
        params: a tree of arrays, known ones: not under `jax.jit`. With sparse layers also one that holds their
            connections: an NNX model, its state, or all variables of a Linen one.
        masks: a tree like `params` of bool arrays, None where nothing is pruned, as `agent_optax.active_masks` returns;
            or the state of an optimizer that holds `agent_optax.sparsify`; or a tree of the connections of sparse
            layers, as `agent_optax.layers.rewire` takes it. Default None: the connections in `params`.

    Returns:
        A tree like `params` with a `jax.experimental.sparse.BCOO`, data [nnz] and indices int32 [nnz, ndim], in place
        of each pruned leaf, and of the weights of each sparse layer: [inputs, outputs].

    Raises:
        ValueError: if `masks` does not fit `params`, nothing is sparse, or an inactive weight is not zero.

    Example:
        >>> import agent_optax, jax.numpy as jnp, optax
        >>> from agent_optax import export
        >>> params = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}
        >>> opt_state = agent_optax.sparsify(optax.sgd(0.1), agent_optax.static(), sparsity=0.75).init(params)
        >>> params = agent_optax.mask_params(params, opt_state)
        >>> sparse_params = export.to_bcoo(params, opt_state)
        >>> sparse_params["kernel"]
        BCOO(float32[4, 4], nse=4)
        >>> bool(((jnp.ones((2, 4)) @ sparse_params["kernel"]) == (jnp.ones((2, 4)) @ params["kernel"])).all())
        True
    """
    treedef = jax.tree.structure(params, is_leaf=is_connections)
    return treedef.unflatten(
        [
            leaf if which is None else _bcoo(name, leaf, which)
            for (name, leaf), which in zip(named_layers(params), which_to_export(params, masks), strict=True)
        ]
    )


def _bcoo(name: str, weights: Any, which: Any) -> sparse.BCOO:
    check_fits(name, weights, which)
    if isinstance(which, Connections):
        indices, order = _sorted_indices(which)
        values, shape = jnp.ravel(weights)[order], (which.inputs, which.outputs)
    else:
        mask = np.asarray(which)
        indices, shape = np.argwhere(mask).astype(np.int32), mask.shape  # in the order of the flat array: sorted
        values = jnp.asarray(weights)[tuple(indices.T)]
    return sparse.BCOO((values, jnp.asarray(indices)), shape=shape, indices_sorted=True, unique_indices=True)


def _sorted_indices(connections: Connections) -> tuple[np.ndarray, np.ndarray]:
    """Input and output of each weight, [nnz, 2], sorted by input; and where it is among the values, [nnz]."""
    inputs, outputs = map(np.asarray, connections.coordinates())
    order = np.lexsort((outputs, inputs))
    return np.stack([inputs[order], outputs[order]], axis=1), order


def from_bcoo(sparse_params: Any, masks: Any = None) -> optax.Params:
    """Dense arrays, or weights of sparse layers, in place of sparse arrays: the inverse of `to_bcoo`.

    Args:
        sparse_params: a tree of arrays and of `jax.experimental.sparse.BCOO`.
        masks: the connections of sparse layers as `to_bcoo` took them. Default None: those in `sparse_params`.

    Returns:
        The tree with arrays only.

    Raises:
        ValueError: if a sparse array has other positions than the connections.

    Example:
        >>> import jax.numpy as jnp
        >>> from agent_optax import export
        >>> params = {"kernel": jnp.array([[0.0, 2.0]])}
        >>> export.from_bcoo(export.to_bcoo(params, {"kernel": params["kernel"] != 0}))["kernel"].tolist()
        [[0.0, 2.0]]
    """
    names, nodes, found, treedef = named_matrices(sparse_params, masks, sparse.BCOO)
    return treedef.unflatten(
        [
            _from_bcoo(name, node, which) if isinstance(node, sparse.BCOO) else node
            for name, node, which in zip(names, nodes, found, strict=True)
        ]
    )


def _from_bcoo(name: str, matrix: sparse.BCOO, which: Any) -> jax.Array:
    if not isinstance(which, Connections):
        return matrix.todense()
    indices, order = _sorted_indices(which)
    check_same_places(name, matrix.shape == (which.inputs, which.outputs) and np.array_equal(matrix.indices, indices))
    return jnp.zeros_like(matrix.data).at[order].set(matrix.data).reshape(which.values_shape)
