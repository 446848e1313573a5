"""What `sparsify` must know about an inner optimizer, read off a trace of its update."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from agent_optax._tree import is_masked
from agent_optax.sparsity.inner._entries import Findings, Known, follow
from agent_optax.sparsity.inner._like_params import map_like_params, split_args
from agent_optax.sparsity.inner._state_arrays import NO_LEAF, leaf_of_each_state


class TracedUpdate(NamedTuple):
    """The update of an optimizer as a jaxpr, on shapes alone."""

    jaxpr: Any
    inputs: tuple[Any, ...]  # (grads, inner state, params, extra arguments), of jax.ShapeDtypeStruct
    outputs: tuple[Any, Any]  # (updates, inner state)


def trace_update(
    inner: optax.GradientTransformationExtraArgs,
    grads: optax.Updates,
    params: optax.Params,
    extra_args: dict[str, Any],
) -> TracedUpdate:
    """Traces one step from the initial state."""
    numeric, others = split_args(map_like_params(lambda tree: tree, extra_args, params))
    grads, params, numeric = (jax.tree.map(_shape, tree) for tree in (grads, params, numeric))
    inputs = (grads, jax.eval_shape(inner.init, params), params, numeric)
    closed, outputs = jax.make_jaxpr(lambda g, s, p, n: inner.update(g, s, p, **n, **others), return_shape=True)(
        *inputs
    )
    return TracedUpdate(closed.jaxpr, inputs, outputs)


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))


class Traits(NamedTuple):
    """What an inner optimizer does to the entries of the pruned leaves; leaves are counted as in params."""

    leaf_of_state: tuple[int, ...]  # for each array of the state, the pruned leaf whose entries it holds, or NO_LEAF
    is_at_rest: tuple[bool, ...]  # whether that array stays at its initial value where a weight is inactive
    is_independent: bool  # whether no entry depends on others: no sum over entries, no matrix product
    unchanged: tuple[int, ...]  # pruned leaves whose update does not depend on gradient, weight or state
    is_flattened: bool  # whether the state holds entries of pruned leaves in a row, where none can be reset
    obstacles: tuple[str, ...]  # what depends on where an entry lies, or mixes entries other than in sums


def traits_of(
    inner: optax.GradientTransformationExtraArgs,
    traced: TracedUpdate,
    pruned: Collection[int],
    exempt: str,
) -> Traits:
    """Follows the entries of the pruned leaves through one step.

    `exempt` is the method by which a memory names the fields that are never reset.
    """
    _, inner_state, params, extra_args = traced.inputs
    leaves = jax.tree.leaves(params)
    shapes = [leaf.shape for leaf in leaves]

    def entries(i: int, rest: Any) -> Known:
        return Known(i, shapes[i], depends=True, rest=rest) if i in pruned else Known()

    def rest_of_zero(array: Any) -> np.ndarray:
        return np.zeros((), array.dtype)

    def of_tree(tree: Any) -> list[Known]:  # zero, or False, where a weight is inactive
        nodes = _like_pruned(tree, params, pruned)
        if nodes is None:
            return [Known(is_uniform=x.size == 1) for x in jax.tree.leaves(tree)]
        return [entries(i, rest_of_zero(x)) for i, x in enumerate(nodes) if not is_masked(x)]

    start = follow(jax.make_jaxpr(inner.init)(params).jaxpr, of_tree(params), shapes, _nothing_found())
    states = jax.tree.leaves(inner_state)
    holders = leaf_of_each_state(inner, inner_state, params, exempt=None)
    reset = leaf_of_each_state(inner, inner_state, params, exempt=exempt)
    before = [
        Known(is_uniform=array.size == 1)
        if i == NO_LEAF
        else entries(i, initial.rest if i == j else None)  # a stored point need not be zero where a weight is inactive
        for i, j, initial, array in zip(holders, reset, start, states, strict=True)
    ]
    found = _nothing_found()
    grads, _, _, numeric = traced.inputs
    inputs = [
        *of_tree(grads),
        *before,
        *of_tree(params),
        *(known for name in sorted(numeric) for known in of_tree(extra_args[name])),
    ]
    outputs = follow(traced.jaxpr, inputs, shapes, found)
    updates, after = outputs[: len(leaves)], outputs[len(leaves) :]

    def is_at_rest(old: Known, new: Known) -> bool:
        return old.rest is not None and new.rest is not None and bool(old.rest == new.rest)

    at_rest = [is_at_rest(old, new) for old, new in zip(before, after, strict=True)]
    return Traits(
        leaf_of_state=tuple(
            i if i in pruned and (rests or not new.is_mixed) else NO_LEAF
            for i, new, rests in zip(reset, after, at_rest, strict=True)
        ),
        is_at_rest=tuple(at_rest),
        is_independent=not found.reductions and not found.structure,
        is_flattened=any(
            i == NO_LEAF and (new.is_joined or (new.leaf is not None and not new.is_mixed))
            for i, new in zip(holders, after, strict=True)
        ),
        unchanged=tuple(i for i in sorted(pruned) if not updates[i].depends),
        obstacles=(*sorted(found.structure), *sorted(found.positions)),
    )


def _like_pruned(tree: Any, params: optax.Params, pruned: Collection[int]) -> list[Any] | None:
    """The nodes of a tree that has an array like each pruned leaf, and the like or nothing for the others."""
    try:
        nodes = jax.tree.structure(params).flatten_up_to(tree)
        is_like = all(
            (is_masked(x) and i not in pruned) or x.shape == p.shape
            for i, (x, p) in enumerate(zip(nodes, jax.tree.leaves(params), strict=True))
        )
    except (AttributeError, TypeError, ValueError):  # another tree
        return None
    return nodes if is_like and nodes else None


def _nothing_found() -> Findings:
    return Findings(set(), set(), set())
