"""The masks in an optimizer state, and parameters made exactly sparse."""

from __future__ import annotations

from typing import Any

import jax
import optax

from agent_optax._tree import is_masked
from agent_optax.sparsity._state import SparsifyState, apply_masks, find_sparsify


def mask_params(params: optax.Params, opt_state: optax.OptState) -> optax.Params:
    r"""Sets the inactive weights to exactly 0.0: how a sparse run starts.

    .. math::
        p \leftarrow m \odot p

    Args:
        params: a tree of arrays.
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
    for state in _sparsify_states(opt_state):
        params = apply_masks(state.active_masks(params), params)
    return params


def active_masks(opt_state: optax.OptState, params: optax.Params) -> Any:
    """The masks of the active weights.

    Args:
        opt_state: the state of an optimizer that holds `sparsify`, at any depth.
        params: a tree of arrays, for the shapes.

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
    merged = jax.tree.map(lambda _: None, params)
    for state in _sparsify_states(opt_state):
        merged = jax.tree.map(
            lambda mask, old: old if is_masked(mask) else mask, state.active_masks(params), merged, is_leaf=is_masked
        )
    return merged


def _sparsify_states(opt_state: optax.OptState) -> list[SparsifyState]:
    states = find_sparsify(opt_state)
    if not states:
        raise ValueError(
            "opt_state holds no sparse optimizer: it must come from agent_optax.sparsify(inner, topology, ...)."
        )
    return states
