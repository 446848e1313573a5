"""N:M sparsity, which hardware multiplies fast: is it there, layer by layer."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from agent_optax._validation import check_positive_int
from agent_optax.export._known_axes import known_axes
from agent_optax.sparsity._default_axes import AxesChoice
from agent_optax.sparsity._leaf_names import leaf_names


class NMReport(NamedTuple):
    """What `n_m_report` says of a layer."""

    is_n_m: bool  # whether the layer can run as an N:M sparse one
    num_groups: int  # groups of m along the axis; 0 when m does not divide it
    num_too_dense: int  # of them, those with more than n active weights
    density: float  # the share of active weights


def is_n_m(mask: Any, n: int = 2, m: int = 4, axis: int = -2) -> bool:
    """Whether at most n weights are active in each m consecutive ones along an axis.

    Args:
        mask: bool [..., K, ...]: True where a weight is active. Or weights, where those that are not 0 count as active.
        n: how many of m may be active. Default 2, as in the 2:4 sparsity of NVIDIA's tensor cores.
        m: the size of a group. Default 4.
        axis: the axis along which groups lie: that over which a product sums, so the input axis, which is the last but
            one (default) of kernels in JAX, [in, out] and [height, width, in, out].

    Returns:
        True when all groups are so; False also when m does not divide the axis.

    Raises:
        ValueError: if `n` or `m` is no positive whole number, n > m, or `mask` has no such axis.

    Example:
        >>> import jax.numpy as jnp
        >>> from agent_optax import export
        >>> export.is_n_m(jnp.array([[1, 0], [0, 1], [1, 1], [0, 0]], bool))
        True
        >>> export.is_n_m(jnp.array([[1, 0], [1, 1], [1, 1], [0, 0]], bool))
        False

    References:
        Mishra et al., Accelerating Sparse Deep Neural Networks, 2021 (https://arxiv.org/abs/2104.08378).
    """
    return _report(mask, n, m, axis).is_n_m


def n_m_report(
    masks: Any, n: int = 2, m: int = 4, axis: Literal["inputs", "outputs"] = "inputs", axes: AxesChoice = None
) -> dict[str, NMReport]:
    """`is_n_m` for each leaf along the inputs of its layers, with what stands in its way.

    Inputs are all axes over which a product sums, in the order of the matrix that a product sees: in the output
    projection of attention heads and their sizes together, in a convolution the positions of the filter and channels.

    Args:
        masks: a tree of masks or weights, None where nothing is pruned, such as `agent_optax.active_masks` returns.
        n: how many of m may be active. Default 2.
        m: the size of a group. Default 4.
        axis: along what groups lie, ``"inputs"`` (default) or ``"outputs"``, as for `agent_optax.n_m`.
        axes: what the axes of leaves are, as for `agent_optax.sparsify`. Default None: by the conventions of Flax.

    Returns:
        Names of leaves to `NMReport`.

    Raises:
        ValueError: as `is_n_m`, if there is no mask, or nothing tells which axes of a leaf are its inputs.

    Example:
        >>> import jax.numpy as jnp
        >>> from agent_optax import export
        >>> masks = {"Dense_0": {"kernel": jnp.tile(jnp.array([[True], [False]]), (4, 3)), "bias": None}}
        >>> export.n_m_report(masks)
        {'Dense_0/kernel': NMReport(is_n_m=True, num_groups=6, num_too_dense=0, density=0.5)}
    """
    leaves, names = jax.tree.leaves(masks), leaf_names(masks)
    if not leaves:
        raise ValueError(f"masks holds no mask: pass agent_optax.active_masks(opt_state, params), got {masks!r}.")
    if axis not in ("inputs", "outputs"):
        raise ValueError(f"axis must be 'inputs' or 'outputs', got {axis!r}: axes= says which those are.")
    reports = {}
    found = known_axes(axes, names, [jnp.shape(leaf) for leaf in leaves], range(len(leaves)))
    for name, leaf, own in zip(names, leaves, found, strict=True):
        layers = jnp.stack(own.unstacked(jnp.asarray(leaf)))
        matrices = layers.reshape(len(layers), -1, layers.shape[-1])
        reports[name] = _report(matrices, n, m, -2 if axis == "inputs" else -1, name)
    return reports


def _report(mask: Any, n: int, m: int, axis: int, name: str = "mask") -> NMReport:
    check_positive_int("n", n, "it is how many of m may be active, such as 2")
    check_positive_int("m", m, "it is the size of a group, such as 4")
    if n > m:
        raise ValueError(f"n must be at most m, got n={n} and m={m}: 2:4 is n=2, m=4.")
    active = np.asarray(jnp.asarray(mask) != 0)
    if not -active.ndim <= axis < active.ndim:
        raise ValueError(
            f"axis={axis} is none of {name}, which has shape {list(active.shape)}: name the axis over which the "
            "product sums."
        )
    along = np.moveaxis(active, axis, -1)
    density = float(active.mean()) if active.size else 0.0
    if along.shape[-1] % m:
        return NMReport(is_n_m=False, num_groups=0, num_too_dense=0, density=density)
    counts = along.reshape(-1, m).sum(axis=-1)
    num_too_dense = int((counts > n).sum())
    return NMReport(is_n_m=num_too_dense == 0, num_groups=counts.size, num_too_dense=num_too_dense, density=density)
