"""Sparse matrices of `jax.experimental.sparse`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import sparse

from agent_optax.export._merge import check_inactive_are_zero, mask_of_each_leaf
from agent_optax.sparsity._leaf_names import leaf_names


def to_bcoo(params: optax.Params, masks: Any) -> Any:
    """Pruned leaves as sparse arrays that hold the active weights only.

    What a mask says is kept: an active weight is held even where it is 0.0, as a weight that has just been grown is.
    Positions are sorted and distinct, and marked so. A sparse matrix takes part in products, ``x @ kernel``, under
    `jax.experimental.sparse.sparsify` or as it is.

    Args:
        params: a tree of arrays, known ones: not under `jax.jit`.
        masks: a tree like `params` of bool arrays, None where nothing is pruned, as `agent_optax.active_masks` returns;
            or the state of an optimizer that holds `agent_optax.sparsify`.

    Returns:
        A tree like `params` with a `jax.experimental.sparse.BCOO`, data [nnz] and indices int32 [nnz, ndim], in place
        of each pruned leaf.

    Raises:
        ValueError: if `masks` does not fit `params`, or an inactive weight is not zero.

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
    leaves, treedef = jax.tree.flatten(params)
    found = mask_of_each_leaf(params, masks)
    return treedef.unflatten(
        [
            leaf if mask is None else _bcoo(name, leaf, np.asarray(mask))
            for name, leaf, mask in zip(leaf_names(params), leaves, found, strict=True)
        ]
    )


def _bcoo(name: str, weights: Any, mask: np.ndarray) -> sparse.BCOO:
    check_inactive_are_zero(name, weights, mask)
    indices = np.argwhere(mask).astype(np.int32)  # in the order of the flat array: sorted
    values = jnp.asarray(weights)[tuple(indices.T)]
    return sparse.BCOO((values, jnp.asarray(indices)), shape=mask.shape, indices_sorted=True, unique_indices=True)


def from_bcoo(sparse_params: Any) -> optax.Params:
    """Dense arrays in place of sparse ones: the inverse of `to_bcoo`.

    Args:
        sparse_params: a tree of arrays and of `jax.experimental.sparse.BCOO`.

    Returns:
        The tree with arrays only.

    Example:
        >>> import jax.numpy as jnp
        >>> from agent_optax import export
        >>> params = {"kernel": jnp.array([[0.0, 2.0]])}
        >>> export.from_bcoo(export.to_bcoo(params, {"kernel": params["kernel"] != 0}))["kernel"].tolist()
        [[0.0, 2.0]]
    """

    def is_sparse(node: Any) -> bool:
        return isinstance(node, sparse.BCOO)

    return jax.tree.map(lambda node: node.todense() if is_sparse(node) else node, sparse_params, is_leaf=is_sparse)
