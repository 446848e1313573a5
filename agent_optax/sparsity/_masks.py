"""The masks in an optimizer state, and parameters made exactly sparse."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from agent_optax.sparsity._matching import matched_leaves
from agent_optax.sparsity._state import SparsifyState, find_sparsify


def mask_params(params: optax.Params, opt_state: optax.OptState) -> optax.Params:
    r"""Sets the inactive weights to exactly 0.0: how a sparse run starts.

    .. math::
        p \leftarrow m \odot p

    Args:
        params: a tree of arrays: the parameters, or an average of them. It may also be a Flax model or its state
            where the optimizer saw arrays, or the other way round: leaves are then matched by their names.
        opt_state: the state of an optimizer that holds `sparsify`, at any depth.

    Returns:
        A tree like `params`.

    Raises:
        ValueError: if `opt_state` holds no `sparsify`.

    Example:
        >>> import agent_optax, jax.numpy as jnp, optax
        >>> params = jnp.ones((4, 4))
        >>> opt_state = agent_optax.sparsify(optax.sgd(0.1), agent_optax.static(), sparsity=0.75).init(params)
        >>> float(agent_optax.mask_params(params, opt_state).sum())
        4.0
    """
    leaves, treedef = jax.tree.flatten(params)
    masks = _mask_of_each_leaf(opt_state, params)
    return treedef.unflatten(
        [p if mask is None else jnp.where(mask, p, jnp.zeros_like(p)) for mask, p in zip(masks, leaves, strict=True)]
    )


def active_masks(opt_state: optax.OptState, params: optax.Params) -> Any:
    """The masks of the active weights.

    Args:
        opt_state: the state of an optimizer that holds `sparsify`, at any depth.
        params: a tree of arrays, for the shapes; as for `mask_params` it may be of another class.

    Returns:
        A tree like `params` of bool arrays, None where nothing is pruned: what ``sparsify(..., masks=)`` takes.

    Raises:
        ValueError: if `opt_state` holds no `sparsify`.

    Example:
        >>> import agent_optax, jax.numpy as jnp, optax
        >>> params = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}
        >>> opt_state = agent_optax.sparsify(optax.sgd(0.1), agent_optax.static(), sparsity=0.75).init(params)
        >>> masks = agent_optax.active_masks(opt_state, params)
        >>> int(masks["kernel"].sum()), masks["bias"]
        (4, None)
    """
    return jax.tree.structure(params).unflatten(_mask_of_each_leaf(opt_state, params))


def _mask_of_each_leaf(opt_state: optax.OptState, params: optax.Params) -> list[Any]:
    found: list[Any] = [None] * len(jax.tree.leaves(params))
    for state in _sparsify_states(opt_state):
        own = matched_leaves(state.active_masks(params), params, "the state", is_part=True)
        found = [old if mask is None else mask for mask, old in zip(own, found, strict=True)]
    return found


def _sparsify_states(opt_state: optax.OptState) -> list[SparsifyState]:
    states = find_sparsify(opt_state)
    if not states:
        raise ValueError(
            "opt_state holds no sparse optimizer: it must come from agent_optax.sparsify(inner, topology, ...)."
        )
    return states
