"""Sparse matrices of `jax.experimental.sparse` by compressed rows, for which JAX has a fast product on a CPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import sparse

from agent_optax.export._compressed_rows import compressed_rows, row_starts
from agent_optax.export._known_axes import known_axes
from agent_optax.export._which_exist import check_fits, check_same_places, named_matrices, which_to_export
from agent_optax.layers import Connections
from agent_optax.layers._sparse_layer import is_connections, named_layers
from agent_optax.sparsity._axes import Axes
from agent_optax.sparsity._default_axes import AxesChoice, check_axes


def to_bcsr(params: optax.Params, masks: Any = None, *, axes: AxesChoice = None) -> Any:
    r"""Pruned leaves as sparse matrices by compressed rows, one row for each output: fast products on a CPU.

    .. math::
        y = x W + b \quad\to\quad y^\top = A x^\top + b, \qquad A = W^\top \text{ [outputs, inputs]}

    JAX multiplies by a BCSR on the left only, so the matrix is transposed: ``(matrix @ x.T).T`` in place of
    ``x @ kernel``. On a CPU that is a native product, for float32, float64 and ``x`` [batch, inputs]: with 2048 x 2048
    weights and a batch of 128 it takes 0.47, 0.22 and 0.09 of the time of the dense product at 90, 95 and 99%,
    `agent_optax.layers.AnyMask` 0.71, 0.42 and 0.11 (see the results). Its gradient is slow: to train, use
    `agent_optax.layers`.

    Args:
        params: a tree of arrays, known ones: not under `jax.jit`. With sparse layers also one that holds their
            connections: an NNX model, its state, or all variables of a Linen one.
        masks: a tree like `params` of bool arrays, None where nothing is pruned, as `agent_optax.active_masks` returns;
            or the state of an optimizer that holds `agent_optax.sparsify`; or a tree of the connections of sparse
            layers, as `agent_optax.layers.rewire` takes it. Default None: the connections in `params`.
        axes: what the axes of leaves are, as for `agent_optax.sparsify`. Default None: by the conventions of Flax.

    Returns:
        A tree like `params` with a `jax.experimental.sparse.BCSR` [outputs, inputs] in place of each pruned leaf and of
        the weights of each sparse layer. The inputs of a convolution are height, width and channels in. Layers that are
        stacked in a leaf are a batch, [stack, outputs, inputs].

    Raises:
        ValueError: if `masks` does not fit `params`, nothing is sparse, an inactive weight is not zero, or nothing
            tells which axes of a leaf are its inputs.
        TypeError: if `axes` is no function, or gives no `agent_optax.Axes`.

    Example:
        >>> import agent_optax, jax.numpy as jnp, optax
        >>> from agent_optax import export
        >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}
        >>> opt_state = agent_optax.sparsify(optax.sgd(0.1), agent_optax.static(), sparsity=0.5).init(params)
        >>> params = agent_optax.mask_params(params, opt_state)
        >>> matrix = export.to_bcsr(params, opt_state)["kernel"]
        >>> matrix
        BCSR(float32[3, 4], nse=6)
        >>> x = jnp.arange(8.0).reshape(2, 4)
        >>> bool(jnp.array_equal((matrix @ x.T).T, x @ params["kernel"]))
        True
    """
    check_axes(axes)
    treedef = jax.tree.structure(params, is_leaf=is_connections)
    names, nodes = [name for name, _ in named_layers(params)], [node for _, node in named_layers(params)]
    found = which_to_export(params, masks)
    pruned = [i for i, which in enumerate(found) if which is not None]
    for i in pruned:
        check_fits(names[i], nodes[i], found[i])
    own_axes = _axes_of_masks(axes, names, nodes, found)
    for i in pruned:
        pattern = _pattern(found[i], own_axes.get(i))
        data = _data(nodes[i], found[i], own_axes[i], pattern) if i in own_axes else jnp.ravel(nodes[i])
        arrays = (jnp.asarray(data), jnp.asarray(pattern.indices), jnp.asarray(pattern.indptr))
        nodes[i] = sparse.BCSR(arrays, shape=pattern.shape, indices_sorted=True, unique_indices=True)
    return treedef.unflatten(nodes)


def from_bcsr(sparse_params: Any, masks: Any = None, *, axes: AxesChoice = None) -> optax.Params:
    """Dense arrays, or weights of sparse layers, in place of sparse matrices: the inverse of `to_bcsr`.

    For a matrix from elsewhere, `agent_optax.layers.AnyMask.from_indices` makes connections of its indices.

    Args:
        sparse_params: a tree of arrays and of `jax.experimental.sparse.BCSR`.
        masks: the masks or the connections as `to_bcsr` took them; of a state, those that `agent_optax.active_masks`
            returns. Default None: the connections in `sparse_params`.
        axes: as `to_bcsr` took it.

    Returns:
        The tree with arrays only.

    Raises:
        ValueError: if a matrix has no mask or connections, or has its weights in other places than they have.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from agent_optax import export, layers
        >>> connections = {"hidden": layers.FanIn.from_indices([[0, 2], [1, 2]], inputs=3, outputs=2)}
        >>> params = {"hidden": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
        >>> sparse_params = export.to_bcsr(params, connections)
        >>> export.from_bcsr(sparse_params, connections)["hidden"].tolist()
        [[1.0, 2.0], [3.0, 4.0]]
    """
    check_axes(axes)
    names, nodes, found, treedef = named_matrices(sparse_params, masks, sparse.BCSR)
    pruned = [i for i, node in enumerate(nodes) if isinstance(node, sparse.BCSR)]
    for i in pruned:
        if found[i] is None:
            raise ValueError(
                f"nothing tells what {names[i]!r}, a BCSR {list(nodes[i].shape)}, was: pass the masks or the "
                "connections that to_bcsr was given."
            )
    shaped = [found[i] if i in pruned else node for i, node in enumerate(nodes)]
    own_axes = _axes_of_masks(axes, names, shaped, found)
    for i in pruned:
        matrix, pattern = nodes[i], _pattern(found[i], own_axes.get(i))
        check_same_places(
            names[i],
            matrix.shape == pattern.shape
            and np.array_equal(matrix.indices, pattern.indices)
            and np.array_equal(matrix.indptr, pattern.indptr),
        )
        nodes[i] = (
            _dense(matrix, found[i], own_axes[i]) if i in own_axes else matrix.data.reshape(found[i].values_shape)
        )
    return treedef.unflatten(nodes)


class _Pattern(NamedTuple):
    """Where a BCSR has its weights."""

    indices: np.ndarray  # int32 [nse], or [stack, nse]: the input of each; what fills up is out of range
    indptr: np.ndarray  # int32 [outputs + 1], or [stack, outputs + 1]: where those of each output begin
    shape: tuple[int, ...]  # [outputs, inputs], or [stack, outputs, inputs]


def _axes_of_masks(axes: AxesChoice, names: list[str], nodes: list[Any], found: list[Any]) -> dict[int, Axes]:
    """The axes of each node that has a mask."""
    masked = [i for i, which in enumerate(found) if which is not None and not isinstance(which, Connections)]
    shapes = [() if is_connections(node) else jnp.shape(node) for node in nodes]
    return dict(zip(masked, known_axes(axes, names, shapes, masked), strict=True))


def _pattern(which: Any, axes: Axes | None) -> _Pattern:
    """Of a mask with these axes, or of connections."""
    if axes is None:
        return _Pattern(*compressed_rows(which), (which.outputs, which.inputs))
    masks = _matrices(which, axes)
    counts = masks.sum(axis=2)
    indices = np.full((len(masks), counts.sum(axis=1).max()), masks.shape[2], np.int32)
    for own, mask in zip(indices, masks, strict=True):
        own[: mask.sum()] = np.nonzero(mask)[1]
    pattern = _Pattern(indices, row_starts(counts), masks.shape)
    return pattern if axes.stack else _Pattern(indices[0], pattern.indptr[0], masks.shape[1:])


def _data(weights: Any, mask: Any, axes: Axes, pattern: _Pattern) -> np.ndarray:
    """The weights in the order of the indices; what fills up is zero."""
    matrices, masks = _matrices(weights, axes), _matrices(mask, axes)
    data = np.zeros(pattern.indices.shape, matrices.dtype)
    for own, matrix, is_active in zip(data.reshape(len(masks), -1), matrices, masks, strict=True):
        own[: is_active.sum()] = matrix[is_active]
    return data


def _dense(matrix: sparse.BCSR, mask: Any, axes: Axes) -> jax.Array:
    """The leaf, with the shape of its mask."""
    mask = jnp.asarray(mask)
    kernels = matrix.todense().reshape(-1, *matrix.shape[-2:]).swapaxes(1, 2)
    return axes.restacked([kernel.reshape(axes.layer_shape(mask.shape)) for kernel in kernels], mask)


def _matrices(leaf: Any, axes: Axes) -> np.ndarray:
    """[layers, outputs, inputs]: each layer of a leaf."""
    layers = [np.asarray(layer) for layer in axes.unstacked(jnp.asarray(leaf))]
    return np.stack([layer.reshape(-1, layer.shape[-1]).T for layer in layers])
