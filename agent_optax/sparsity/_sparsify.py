"""The sparse optimizer: any Optax optimizer, on the active weights only."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from agent_optax._tree import is_masked
from agent_optax._validation import check_fraction
from agent_optax.sparsity._distribution import Distribution, erk
from agent_optax.sparsity._growth_reset import reset_grown
from agent_optax.sparsity._state import SparsifyState, apply_masks
from agent_optax.sparsity._topology import Layer, Topology
from agent_optax.sparsity._where import given_masks, kernels, prunable, start_masks


def sparsify(
    inner: optax.GradientTransformation,
    topology: Topology,
    *,
    sparsity: Any = None,
    distribution: Distribution = erk,
    where: Any = kernels,
    key: int | jax.Array = 0,
    masks: Any = None,
    grow_by: Literal["raw", "corrected"] = "raw",
) -> optax.GradientTransformationExtraArgs:
    r"""Makes any optimizer sparse: wholly inside Optax, with nothing to call after the step.

    .. math::
        p \leftarrow m \odot (p + \mathrm{inner}(m \odot g))

    The updates are -p where a weight is inactive, so `optax.apply_updates` leaves it at exactly 0.0. When the
    topology is due, after the inner update and on the new weights, the masks m change: a dropped weight becomes 0; a
    grown one starts at 0, and every per-parameter state of `inner` starts there again from its initial value. A
    topology update is left out, and counted, when a gradient or weight is not finite.

    Put it outermost: ``sparsify(optax.chain(...), ...)``. Start from ``mask_params(params, opt_state)``.

    Args:
        inner: any Optax optimizer.
        topology: `static()`, `set_()`, `rigl()`, `set_itop()` or `rigl_itop()`.
        sparsity: the share of inactive weights over all pruned leaves, in [0, 1). Or one for each leaf: a tree like
            params with None where nothing is pruned, or a callable on the leaf's path such as ``"Dense_0/kernel"``;
            `distribution` is not used then.
        distribution: shares `sparsity` among leaves: `erk` (default, as in the paper), `erdos_renyi`, `uniform`, or any
            function of shapes and sparsity. A leaf gets exactly ``round(density * size)`` active weights.
        where: the leaves to prune: a callable on params, or a tree of bools. Default `kernels`.
        key: seeds the start masks and random growth; an int or a JAX random key.
        masks: start masks instead of random ones (a lottery ticket): a boolean tree like params, None where nothing
            is pruned. `sparsity`, `distribution` and `where` are not used then.
        grow_by: whether growth sees the ``"raw"`` dense gradient (default, as the paper) or the ``"corrected"`` one.

    Returns:
        A `optax.GradientTransformationExtraArgs`; its update needs `params`, and hands extra arguments on to `inner`.

    Raises:
        ValueError: if `sparsity` is missing or outside [0, 1), `grow_by` is unknown, `where` selects nothing, or trees
            do not match (the last two from ``init``).
        TypeError: from ``init``, if a leaf to prune is not floating-point.

    Example:
        >>> import agent_optax, jax.numpy as jnp, optax
        >>> params = {"kernel": jnp.ones((20, 10)), "bias": jnp.zeros(10)}
        >>> tx = agent_optax.sparsify(optax.adam(1e-3), agent_optax.rigl(update_every=100), sparsity=0.9)
        >>> opt_state = tx.init(params)
        >>> params = agent_optax.mask_params(params, opt_state)
        >>> int(jnp.sum(params["kernel"] != 0))
        20

    References:
        Evci et al., Rigging the Lottery, ICML 2020; Liu et al., In-Time Over-Parameterization, ICML 2021.
    """
    if isinstance(inner, optax.MultiSteps):
        inner = inner.gradient_transformation()
    if sparsity is None and masks is None:
        raise ValueError("sparsify needs sparsity=, such as sparsity=0.9, or start masks with masks=.")
    if isinstance(sparsity, jax.Array):
        raise ValueError(
            f"sparsity must be a plain number, because it fixes shapes and counts, got {sparsity!r}. Under "
            "optax.inject_hyperparams pass static_args=('sparsity', 'distribution', 'where', 'key')."
        )
    if isinstance(sparsity, (int, float)):
        check_fraction("sparsity", sparsity, "it is the share of inactive weights, such as 0.9", below_one=True)
    if grow_by not in ("raw", "corrected"):
        raise ValueError(f"grow_by must be 'raw' or 'corrected', got {grow_by!r}.")
    key = jax.random.key(key) if isinstance(key, (int, np.integer)) else key
    key = key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> SparsifyState:
        mask_key, topology_key = jax.random.split(key)
        if masks is not None and jax.tree.leaves(params):
            active = given_masks(params, masks)
        else:
            active = start_masks(params, prunable(params, where), sparsity, distribution, mask_key)
        return SparsifyState(
            inner_state=inner.init(apply_masks(active, params)),
            masks=active,
            ever_active=None if topology.is_static else jax.tree.map(jnp.copy, active),
            topology_key=jax.random.key_data(topology_key),
            topology_step=jnp.zeros((), jnp.int32),
            num_dropped=jnp.zeros((), jnp.int32),
            num_grown=jnp.zeros((), jnp.int32),
            num_topology_updates=jnp.zeros((), jnp.int32),
            num_skipped_updates=jnp.zeros((), jnp.int32),
        )

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, SparsifyState]:
        if params is None:
            raise ValueError("sparsify needs the parameters: call tx.update(grads, opt_state, params, ...).")
        grads = updates
        growth_grads = _corrected(grads, state.inner_state, extra_args) if grow_by == "corrected" else grads
        updates, inner_state = inner.update(
            apply_masks(state.masks, grads), state.inner_state, params, active_masks=state.masks, **extra_args
        )
        state = state._replace(inner_state=inner_state, topology_step=state.topology_step + 1)
        kept = state.masks
        if not topology.is_static:

            def rewire(state: SparsifyState) -> tuple[SparsifyState, Any]:
                return _rewire(topology, inner, state, updates, params, grads, growth_grads)

            state, kept = jax.lax.cond(
                topology.is_due(state.topology_step), rewire, lambda state: (state, state.masks), state
            )
        return _masked_updates(kept, updates, params), state

    return optax.GradientTransformationExtraArgs(init, update)


def _masked_updates(kept: Any, updates: optax.Updates, params: optax.Params) -> optax.Updates:
    """The update where a weight stays active, -p elsewhere, in the parameter's dtype."""

    def masked(mask: Any, u: jax.Array, p: jax.Array) -> jax.Array:
        return u if is_masked(mask) else jnp.where(mask, u.astype(p.dtype), -p)

    return jax.tree.map(masked, kept, updates, params, is_leaf=is_masked)


def _corrected(grads: optax.Updates, inner_state: optax.OptState, extra_args: dict[str, Any]) -> optax.Updates:
    """The dense corrected gradient, from the state in which `inner` finds it."""
    is_correction = lambda node: hasattr(node, "correct") and hasattr(node, "memory_state")  # noqa: E731
    states = [node for node in jax.tree.leaves(inner_state, is_leaf=is_correction) if is_correction(node)]
    if len(states) != 1:
        raise ValueError(
            f"grow_by='corrected' needs exactly one correct_gradients inside the inner optimizer, found {len(states)}. "
            "Use grow_by='raw', or put agent_optax.correct_gradients into the chain."
        )
    return states[0].correct(grads, states[0].memory_state.recall(grads, extra_args))


def _all_finite(tree: Any) -> jax.Array:
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(finite)) if finite else jnp.asarray(True)


def _rewire(
    topology: Topology,
    inner: optax.GradientTransformationExtraArgs,
    state: SparsifyState,
    updates: optax.Updates,
    params: optax.Params,
    grads: optax.Updates,
    growth_grads: optax.Updates,
) -> tuple[SparsifyState, Any]:
    """A topology update on the new weights: the new state, and the weights that were active and stay so."""
    new_params = optax.apply_updates(params, _masked_updates(state.masks, updates, params))
    layers = []

    def collect(mask: Any, weights: jax.Array, grad: jax.Array, ever: Any) -> None:
        if not is_masked(mask):
            layers.append(Layer(weights, mask, grad, ever))

    jax.tree.map(collect, state.masks, new_params, growth_grads, state.ever_active, is_leaf=is_masked)
    usable = _all_finite([layer.grads for layer in layers]) & _all_finite([layer.weights for layer in layers])
    key = jax.random.wrap_key_data(state.topology_key)
    next_key, key = jax.random.split(key)
    new_masks = topology.rewire(layers, state.topology_step, key)
    new_masks = [jnp.where(usable, new, layer.mask) for new, layer in zip(new_masks, layers, strict=True)]

    treedef = jax.tree.structure(state.masks)
    masks = treedef.unflatten(new_masks)
    kept = jax.tree.map(jnp.logical_and, masks, state.masks)
    grown = jax.tree.map(lambda new, old: new & ~old, masks, state.masks)
    count = lambda tree: sum((jnp.sum(m, dtype=jnp.int32) for m in jax.tree.leaves(tree)), jnp.zeros((), jnp.int32))  # noqa: E731
    return (
        state._replace(
            inner_state=reset_grown(inner, state.inner_state, apply_masks(masks, new_params), grown),
            masks=masks,
            ever_active=jax.tree.map(jnp.logical_or, state.ever_active, masks),
            topology_key=jax.random.key_data(next_key),
            num_dropped=count(jax.tree.map(lambda new, old: old & ~new, masks, state.masks)),
            num_grown=count(grown),
            num_topology_updates=state.num_topology_updates + usable,
            num_skipped_updates=state.num_skipped_updates + ~usable,
        ),
        kept,
    )
