"""The inner update with the state of inactive weights held at its initial value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import optax

from agent_optax._tree import is_masked
from agent_optax.sparsity._entrywise import EntryMixing, entry_mixing

NO_LEAF = -1


def leaf_of_each_state(
    inner: optax.GradientTransformation, inner_state: optax.OptState, pruned: Any, params: optax.Params, exempt: str
) -> list[int]:
    """For each array of the inner state, the index of the pruned leaf whose entries it holds, or NO_LEAF.

    Per-parameter states are found as `optax.tree.map_params` finds them. An array whose trailing axes are not those of
    its parameter (a factored second moment, say) holds no single entries. A state that has a method named by `exempt`
    names the fields that are left alone.
    """
    treedef = jax.tree.structure(params)
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(params)]
    is_pruned = [not is_masked(m) for m in treedef.flatten_up_to(pruned)]

    def mark(like_params: Any) -> Any:
        subtrees = treedef.flatten_up_to(like_params)
        return treedef.unflatten(
            [
                i if is_pruned[i] and jax.tree_util.all_leaves([subtree]) else _no_leaves(subtree)
                for i, subtree in enumerate(subtrees)
            ]
        )

    marked = optax.tree.map_params(
        inner.init,
        mark,
        inner_state,
        transform_non_params=lambda _: NO_LEAF,
        is_leaf=lambda _: True,  # a whole tree like params at a time: some optimizers keep several arrays a parameter
    )

    def leave_out(node: Any) -> Any:
        if not hasattr(node, exempt):
            return node
        fields = {f: _no_leaves(getattr(node, f)) for f in getattr(node, exempt)()}
        return node._replace(**fields)

    marked = jax.tree.map(leave_out, marked, is_leaf=lambda node: hasattr(node, exempt))

    def check(i: int, state: jax.Array) -> int:
        return i if i != NO_LEAF and state.shape[state.ndim - len(shapes[i]) :] == shapes[i] else NO_LEAF

    return [check(i, state) for i, state in zip(jax.tree.leaves(marked), jax.tree.leaves(inner_state), strict=True)]


def _no_leaves(tree: Any) -> Any:
    return jax.tree.map(lambda _: NO_LEAF, tree)


class TracedUpdate:
    """The inner update as a jaxpr: what it mixes, and its evaluation with masks put in where states are computed.

    An optimizer computes the update from its new state (the new momentum, say). Masking that state after the fact
    makes XLA compute it twice, from an old state that it then has to copy; masked where it is computed it is written
    once, in place, and read by the update.
    """

    def __init__(
        self,
        inner: optax.GradientTransformationExtraArgs,
        grads: optax.Updates,
        inner_state: optax.OptState,
        params: optax.Params,
        extra_args: dict[str, Any],
    ):
        structure = jax.tree.structure(grads)
        tree_args = {k: v for k, v in extra_args.items() if _is_like(v, grads, structure)}
        other_args = {k: v for k, v in extra_args.items() if k not in tree_args}
        self.operands = (grads, inner_state, params, tree_args)
        self.closed, out_shape = jax.make_jaxpr(
            lambda g, s, p, t: inner.update(g, s, p, **t, **other_args), return_shape=True
        )(*self.operands)
        self.out_tree = jax.tree.structure(out_shape)
        self.num_updates = len(jax.tree.leaves(out_shape[0]))

    def mixing(self, pruned_leaves: list[int], leaf_of_state: list[int]) -> EntryMixing:
        """How the update mixes the entries of the leaves with these indices."""
        grads, _, _, tree_args = self.operands
        shapes = [leaf.shape if i in pruned_leaves else None for i, leaf in enumerate(jax.tree.leaves(grads))]
        of_state = [None if i == NO_LEAF else shapes[i] for i in leaf_of_state]
        return entry_mixing(self.closed.jaxpr, [*shapes, *of_state, *shapes, *(shapes * len(tree_args))])

    def evaluate(self, select: Callable[[int, jax.Array], jax.Array] | None = None) -> tuple[Any, Any]:
        """Returns (updates, new inner state), with ``select(k, state)`` applied to the k-th array of the state."""
        jaxpr = self.closed.jaxpr
        values = dict(zip(jaxpr.constvars, self.closed.consts, strict=True))
        values.update(zip(jaxpr.invars, jax.tree.leaves(self.operands), strict=True))
        is_literal = lambda atom: isinstance(atom, jax.extend.core.Literal)  # noqa: E731
        states = {v: k for k, v in enumerate(jaxpr.outvars[self.num_updates :]) if not is_literal(v)}

        def read(atom: Any) -> Any:
            return atom.val if is_literal(atom) else values[atom]

        for v in states.keys() & values.keys():  # a state that the update leaves as it was
            values[v] = select(states[v], values[v]) if select else values[v]
        for eqn in jaxpr.eqns:
            bound = eqn.primitive.get_bind_params(eqn.params)
            functions, parameters = bound if isinstance(bound, tuple) else ((), bound)  # a pair before JAX 0.8
            outputs = eqn.primitive.bind(*functions, *map(read, eqn.invars), **parameters)
            outputs = outputs if eqn.primitive.multiple_results else [outputs]
            for v, output in zip(eqn.outvars, outputs, strict=True):
                values[v] = select(states[v], output) if select and v in states else output
        return self.out_tree.unflatten([read(atom) for atom in jaxpr.outvars])


def _is_like(tree: Any, grads: optax.Updates, structure: Any) -> bool:
    return jax.tree.structure(tree) == structure and all(
        jnp.shape(a) == jnp.shape(b) for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(grads), strict=True)
    )
