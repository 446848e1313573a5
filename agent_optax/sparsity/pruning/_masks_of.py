"""The masks of a network that is sparse already."""

from __future__ import annotations

from typing import Any

import jax
import optax

from agent_optax.sparsity._where import kernels, prunable


def masks_of(params: optax.Params, where: Any = kernels) -> Any:
    r"""The masks of the weights that are not zero, for ``sparsify(..., masks=)``: trains a pruned network on as it is.

    .. math::
        m = [\,w \ne 0\,]

    Args:
        params: a tree of arrays: a network pruned by whatever means.
        where: the leaves that are pruned, as for `sparsify`. Default `kernels`.

    Returns:
        A tree like `params` of bool arrays, None where nothing is pruned.

    Raises:
        ValueError: if `where` selects nothing.

    Example:
        >>> import agent_optax, jax.numpy as jnp, optax
        >>> params = {"kernel": jnp.array([[3.0, 0.0], [0.0, -2.0]]), "bias": jnp.zeros(2)}
        >>> masks = agent_optax.masks_of(params)
        >>> masks["kernel"].tolist(), masks["bias"]
        ([[True, False], [False, True]], None)
        >>> tx = agent_optax.sparsify(optax.adam(1e-4), agent_optax.static(), masks=masks)
    """
    return jax.tree.map(lambda p, is_pruned: p != 0 if is_pruned else None, params, prunable(params, where))
