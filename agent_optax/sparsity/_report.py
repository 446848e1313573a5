"""The line that `init` logs: which leaves are pruned, and which are left alone."""

from __future__ import annotations

import logging
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from agent_optax._tree import is_masked
from agent_optax.sparsity._leaf_names import leaf_names

logger = logging.getLogger("agent_optax")


def log_pruned_leaves(params: optax.Params, masks: Any) -> None:
    """Logs one line at level INFO; `masks` is like params, hidden where nothing is pruned."""
    if not logger.isEnabledFor(logging.INFO):
        return
    names = leaf_names(params)
    sizes = [math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(params)]
    is_pruned = [not is_masked(mask) for mask in jax.tree.structure(params).flatten_up_to(masks)]
    taken = [name for name, pruned in zip(names, is_pruned, strict=True) if pruned]
    left = [name for name, pruned in zip(names, is_pruned, strict=True) if not pruned]
    num_prunable = sum(size for size, pruned in zip(sizes, is_pruned, strict=True) if pruned)
    logger.info(
        "sparsify prunes %d of %d leaves, which hold %s of %s weights: %s; not pruned: %s",
        len(taken),
        len(names),
        f"{num_prunable:,}",
        f"{sum(sizes):,}",
        _abridged(taken) or "none",
        _abridged(left) or "none",
    )


def _abridged(names: list[str]) -> str:
    """Names that differ only in the numbers of layers once, with * for the numbers, as `named` takes them."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"(?<![^/_])\d+(?![^/])", "*", name), []).append(name)
    return ", ".join(group[0] if len(group) == 1 else f"{kind} ({len(group)})" for kind, group in groups.items())
