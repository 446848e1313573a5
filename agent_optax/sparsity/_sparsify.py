"""The sparse optimizer: any Optax optimizer, on the active weights only."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from agent_optax._tree import is_masked
from agent_optax._validation import check_fraction, check_part, is_concrete_number
from agent_optax.sparsity._compact import as_dense_updates, check_compact, compact_update, likely_extra_args
from agent_optax.sparsity._compact_active import compact_start, follow_points, warn_if_gathered
from agent_optax.sparsity._dense import dense_start, dense_update
from agent_optax.sparsity._distribution import Distribution, erk
from agent_optax.sparsity._latent import latent_start, latent_update, with_points
from agent_optax.sparsity._pattern import Pattern, PatternChoice, check_pattern
from agent_optax.sparsity._rewiring import SparseOptimizer
from agent_optax.sparsity._start import given_start, random_start
from agent_optax.sparsity._state import SparsifyState, apply_masks
from agent_optax.sparsity._topology import Topology
from agent_optax.sparsity._where import given_masks, kernels, prunable


def sparsify(
    inner: optax.GradientTransformation,
    topology: Topology,
    *,
    sparsity: Any = None,
    distribution: Distribution = erk,
    where: Any = kernels,
    storage: Literal["dense", "compact"] = "dense",
    key: int | jax.Array = 0,
    masks: Any = None,
    pattern: PatternChoice = None,
    grow_by: Literal["raw", "corrected"] = "raw",
    stagger: bool = False,
    dense_updates: bool = False,
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
        topology: `static()`, `set_()`, `rigl()`, `set_itop()`, `rigl_itop()`, `snfs()`, `drop_and_grow()`,
            `gradual_pruning()` or `bayesian_rewiring()`.
        sparsity: the share of inactive weights over all pruned leaves, in [0, 1). Or one for each leaf: a tree like
            params with None where nothing is pruned, or a callable on the leaf's path such as ``"Dense_0/kernel"``;
            `distribution` is not used then.
        distribution: shares `sparsity` among leaves: `erk` (default, as in the paper), `erdos_renyi`, `uniform`, or any
            function of shapes and sparsity. A leaf gets exactly ``round(density * size)`` active weights.
        where: the leaves to prune: a callable on params, or a tree of bools. Default `kernels`.
        storage: ``"dense"``: the inner optimizer holds whole arrays. ``"compact"``: it holds one-dimensional arrays of
            the active entries, so that momentum, moments, snapshots and tables shrink with the density, and a step
            costs what its active weights cost. That needs an inner optimizer that treats each entry alike (muon and
            adafactor do not), and exactly sparse parameters from the start: call `mask_params`. Weights grown since
            the last refresh are not corrected until the next.
        key: seeds the start masks and random growth; an int or a JAX random key.
        masks: start masks instead of random ones (a lottery ticket): a boolean tree like params, None where nothing
            is pruned. `sparsity`, `distribution` and `where` are not used then (`gradual_pruning` ends at `sparsity`).
        pattern: which masks are allowed: `n_m(2, 4)`, `blocks((4, 4))`, `output_channels()`, or a callable on the
            leaf's path that gives one of these, or None for any. Default None: unstructured.
        grow_by: whether growth sees the ``"raw"`` dense gradient (default, as the paper) or the ``"corrected"`` one.
        stagger: whether layers change at different steps, evenly spread over the interval of the topology, so that no
            step does the work of all of them. Each layer still changes once an interval, later by its share of it.
        dense_updates: whether compact storage returns arrays like params, for another transformation or wrapper that
            computes with them, in place of nodes that hold the active entries and add themselves to a parameter.

    Returns:
        A `optax.GradientTransformationExtraArgs`; its update needs `params`, and hands extra arguments on to `inner`.

    Raises:
        ValueError: if `sparsity` is missing or outside [0, 1), `grow_by` is unknown, or the topology cannot work with
            `storage` or `stagger`; from ``init``, if `where` selects nothing, trees do not match, or a leaf cannot have
            the pattern.
        TypeError: if `inner`, `topology`, `pattern` or `key` is not one; from ``init``, if a leaf to prune is not
            floating-point.

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
    check_part("inner", inner, "update", "optax.sgd(0.1)")
    check_part("topology", topology, "rewire", "agent_optax.rigl()")
    check_pattern(pattern)
    if isinstance(pattern, Pattern) and pattern.density is not None:
        sparsity = _fixed_sparsity(sparsity, pattern, 1 - pattern.density)
    if sparsity is None and (masks is None or topology.initial_sparsity is not None):
        raise ValueError("sparsify needs sparsity=, such as sparsity=0.9, or start masks with masks=.")
    if isinstance(sparsity, (jax.Array, np.ndarray)):
        raise ValueError(
            f"sparsity must be a plain number, because it fixes shapes and counts, got {sparsity!r}. Under "
            "optax.inject_hyperparams pass static_args=('sparsity', 'distribution', 'where')."
        )
    if is_concrete_number(sparsity):
        check_fraction("sparsity", sparsity, "it is the share of inactive weights, such as 0.9", below_one=True)
    if grow_by not in ("raw", "corrected"):
        raise ValueError(f"grow_by must be 'raw' or 'corrected', got {grow_by!r}.")
    if storage not in ("dense", "compact"):
        raise ValueError(f"storage must be 'dense' or 'compact', got {storage!r}.")
    if storage == "compact" and grow_by == "corrected":
        raise ValueError(
            "grow_by='corrected' needs the corrected gradient of inactive weights, which storage='compact' does not "
            "hold: use grow_by='raw' or storage='dense'."
        )
    if storage == "compact" and not topology.keeps_counts:
        raise ValueError(
            f"storage='compact' needs layers that keep their number of active weights, and {topology} changes it: use "
            "storage='dense'."
        )
    if stagger and not topology.is_layerwise:
        raise ValueError(f"stagger=True changes layers at different steps, and {topology} needs all of them at once.")
    key = _random_key(key)
    optimizer = SparseOptimizer(optax.with_extra_args_support(inner), topology, pattern, grow_by, stagger)
    is_checked: set[Any] = set()

    def init(params: optax.Params) -> SparsifyState:
        mask_key, topology_key = jax.random.split(key)
        if masks is not None and jax.tree.leaves(params):
            active = given_masks(params, masks)
            names, patterns = optimizer.patterns(params, active)
            final_sparsity = None if topology.initial_sparsity is None else sparsity
            must_count = storage == "compact"
            start = given_start(params, active, patterns, names, final_sparsity, distribution, must_count)
        else:
            chosen = prunable(params, where)
            hidden = jax.tree.map(lambda c, p: p if c else optax.MaskedNode(), chosen, params)
            names, patterns = optimizer.patterns(params, hidden)
            start = random_start(params, chosen, patterns, sparsity, topology.initial_sparsity, distribution, mask_key)
            active = start.masks
        sparse_params = apply_masks(active, params)
        if storage == "compact":
            check(params, active, likely_extra_args(params), is_last_chance=False)
            warn_if_gathered(params, active, names)
            active_weights = compact_start(active, topology.is_static, start.counts)
            inner_state = optimizer.inner.init(active_weights.gather(sparse_params))
            active_weights = follow_points(active_weights, inner_state)
        else:
            inner_state = optimizer.inner.init(sparse_params)
            if topology.has_latent_weights:
                active_weights = with_points(latent_start(active, params, jax.random.fold_in(key, 2)), inner_state)
            else:
                active_weights = dense_start(active, topology.is_static)
        return SparsifyState(
            inner_state=inner_state,
            active_weights=active_weights,
            topology_state=topology.init(params, active, start.targets),
            num_prunable=jnp.asarray(sum(mask.size for mask in jax.tree.leaves(active)), jnp.float32),
            topology_key=jax.random.key_data(topology_key),
            topology_step=jnp.zeros((), jnp.int32),
            num_dropped=jnp.zeros((), jnp.int32),
            num_grown=jnp.zeros((), jnp.int32),
            num_topology_updates=jnp.zeros((), jnp.int32),
            num_skipped_updates=jnp.zeros((), jnp.int32),
        )

    def check(params: optax.Params, active: Any, extra_args: dict[str, Any], is_last_chance: bool) -> None:
        """Looks at the inner optimizer once for each kind of parameters: at init, or when it needs more arguments."""
        kind = (jax.tree.structure(params), *(jnp.shape(p) for p in jax.tree.leaves(params)))
        if kind in is_checked:
            return
        leaves = jax.tree.structure(params).flatten_up_to(active)
        pruned = [i for i, m in enumerate(leaves) if not is_masked(m)]
        try:
            check_compact(optimizer.inner, params, pruned, extra_args)
        except Exception as error:
            if is_last_chance or "storage=" in str(error):
                raise
            return
        is_checked.add(kind)

    def take_step(
        grads: optax.Updates, state: SparsifyState, params: optax.Params, extra_args: dict[str, Any]
    ) -> tuple[optax.Updates, SparsifyState]:
        state = state._replace(topology_step=state.topology_step + 1)
        state = state._replace(topology_state=topology.observe(state.topology_state, grads))
        if topology.has_latent_weights:
            return latent_update(optimizer, grads, state, params, extra_args)
        if storage == "dense":
            return dense_update(optimizer, grads, state, params, extra_args)
        check(params, state.active_weights.indices, extra_args, is_last_chance=True)
        updates, state = compact_update(optimizer, grads, state, params, extra_args)
        return (as_dense_updates(updates, params) if dense_updates else updates), state

    compiled_step = jax.jit(take_step)  # outside any jit, a loop would otherwise compile anew at each step

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, SparsifyState]:
        if params is None:
            raise ValueError("sparsify needs the parameters: call tx.update(grads, opt_state, params, ...).")
        is_plain = all(isinstance(leaf, (jax.Array, np.ndarray)) for leaf in jax.tree.leaves(extra_args))
        return (compiled_step if is_plain else take_step)(updates, state, params, extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


def _fixed_sparsity(sparsity: Any, pattern: Pattern, fixed: float) -> Any:
    """The sparsity that a pattern fixes; ValueError if another number was asked for."""
    if is_concrete_number(sparsity) and abs(sparsity - fixed) > 1e-9:
        raise ValueError(
            f"sparsity={sparsity} does not fit pattern={pattern}, whose sparsity is {fixed:g}: leave it out."
        )
    return fixed if sparsity is None else sparsity


def _random_key(key: int | jax.Array) -> jax.Array:
    """A typed key from a seed, a typed key or key data; a seed may be an array, as inject_hyperparams makes it."""
    if isinstance(key, (int, np.integer)):
        return jax.random.key(key)
    if isinstance(key, (np.ndarray, jax.Array)):
        key = jnp.asarray(key)
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            is_default = key.dtype == jax.random.key(0).dtype  # the state holds key data, of the default kind
            return key if is_default else jax.random.key(jax.random.bits(key))
        if jnp.issubdtype(key.dtype, jnp.integer):
            return jax.random.wrap_key_data(key) if key.ndim else jax.random.key(key)
    raise TypeError(f"key must be a seed such as 0, or a random key such as jax.random.key(0) makes, got {key!r}.")
