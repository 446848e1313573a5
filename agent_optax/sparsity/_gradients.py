"""Checks of the gradients that a step is given."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from agent_optax.sparsity._leaf_names import leaf_names


def check_grads(grads: optax.Updates, params: optax.Params) -> None:
    """Raises ValueError unless the gradient is a tree like params, and each array has the shape of its parameter."""
    if jax.tree.structure(grads) != jax.tree.structure(params):
        names, own = leaf_names(params), leaf_names(grads)
        missing, other = ([n for n in a if n not in b] for a, b in ((names, own), (own, names)))
        difference = (
            f"it lacks {missing[0]}"
            if missing
            else f"params has no {other[0]}"
            if other
            else f"it is a {type(grads).__name__} and params a {type(params).__name__}, or parts of them differ so"
        )
        raise ValueError(f"the gradient must be a tree like params, but {difference}.")
    for name, g, p in zip(leaf_names(params), jax.tree.leaves(grads), jax.tree.leaves(params), strict=True):
        if jnp.shape(g) != jnp.shape(p):
            raise ValueError(
                f"the gradient of {name or 'the parameter'} has the shape {list(jnp.shape(g))}, but the parameter has "
                f"{list(jnp.shape(p))}: sparsify takes one gradient of the shape of each parameter. Gradients of "
                "single examples, say, must be combined before it: "
                "optax.chain(optax.contrib.differentially_private_aggregate(...), agent_optax.sparsify(...))."
            )
