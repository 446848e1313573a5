"""The sparse optimizer: any Optax optimizer, on the active weights only."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from agent_optax._tree import zero_like
from agent_optax._validation import check_fraction, check_part, is_concrete_number
from agent_optax.sparsity._default_axes import AxesChoice, check_axes
from agent_optax.sparsity._distribution import Distribution, erk
from agent_optax.sparsity._given_masks import copied_masks
from agent_optax.sparsity._gradients import check_grads
from agent_optax.sparsity._pattern import PatternChoice, check_pattern, fixed_sparsity
from agent_optax.sparsity._pruned_leaf import PrunedLeaf
from agent_optax.sparsity._report import log_pruned_leaves
from agent_optax.sparsity._sparse_optimizer import SparseOptimizer
from agent_optax.sparsity._start import Start, given_start, random_start
from agent_optax.sparsity._state import SparsifyState
from agent_optax.sparsity._storage import Storage
from agent_optax.sparsity._topology import Topology
from agent_optax.sparsity._where import kernels, prunable
from agent_optax.sparsity.inner._like_params import split_args
from agent_optax.sparsity.storages._compact import Compact
from agent_optax.sparsity.storages._dense import Dense


def sparsify(
    inner: optax.GradientTransformation,
    topology: Topology,
    *,
    sparsity: Any = None,
    distribution: Distribution = erk,
    where: Any = kernels,
    storage: Literal["dense", "compact"] | Storage = "dense",
    key: int | jax.Array = 0,
    masks: Any = None,
    pattern: PatternChoice = None,
    axes: AxesChoice = None,
    grow_by: Literal["raw", "corrected"] = "raw",
    stagger: bool = False,
    allow_empty_layers: bool = False,
    updates: Literal["arrays", "sparse"] = "arrays",
    dense_updates: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Makes any optimizer sparse: wholly inside Optax, with nothing to call after the step.

    .. math::
        p \leftarrow m \odot (p + \mathrm{inner}(m \odot g))

    The updates are -p where a weight is inactive, so `optax.apply_updates` leaves it at exactly 0.0. When the
    topology is due, after the inner update and on the new weights, the masks m change: a dropped weight becomes 0; a
    grown one starts at 0, and every per-parameter state of `inner` starts there again from its initial value. A
    topology update is skipped, and counted, when a gradient or weight is not finite.

    Put the whole optimizer inside, ``sparsify(optax.chain(...), ...)``: what is chained after it would change the -p.
    Start from ``mask_params(params, opt_state)``. The inner optimizer runs as it is; gradients of inactive weights,
    and extra arguments that are trees like params, reach it as zeros.

    Args:
        inner: any Optax optimizer.
        topology: `static()`, `set_()`, `rigl()`, `set_itop()`, `rigl_itop()`, `snfs()`, `drop_and_grow()`,
            `gradual_pruning()`, `ac_dc()`, `straight_through()` or `bayesian_rewiring()`.
        sparsity: the share of inactive weights over all pruned leaves, in [0, 1). Or one for each leaf: a tree like
            params with None where nothing is pruned, or a function of the leaf's path such as ``"Dense_0/kernel"``;
            `distribution` is not used then.
        distribution: shares `sparsity` among leaves: `erk` (default, as in the paper), `erdos_renyi`, `uniform`, or any
            function of the shapes of layers, ``[*spatial, inputs, outputs]``, and sparsity. A layer gets exactly
            ``round(density * size)`` active weights, but see `allow_empty_layers`.
        where: the leaves to prune: a function of params, or a tree of bools. Default `kernels`. Leaves that `inner`
            never updates, such as frozen ones (`optax.set_to_zero`), are left alone. ``init`` logs which leaves are
            pruned and which are not, in one line, at level INFO of the logger ``"agent_optax"``.
        storage: ``"dense"``: the inner optimizer holds whole arrays. ``"compact"``: it holds the active entries only,
            so that momentum, moments, snapshots and tables shrink with the density, and its step costs what its active
            weights cost. That needs an inner optimizer that treats each entry alike (muon and adafactor do not), and
            exactly sparse parameters from the start: call `mask_params`. Weights grown since the last refresh are not
            corrected until the next. Or a `agent_optax.typing.Storage`.
        key: seeds the start masks and random growth; an int or a JAX random key.
        masks: start masks instead of random ones (a lottery ticket): a boolean tree like params, None where nothing
            is pruned. `sparsity`, `distribution` and `where` are not used then (`gradual_pruning` and
            `ac_dc` end at `sparsity`).
        pattern: which masks are allowed: `n_m(2, 4)`, `fan_in()`, `blocks((4, 4))`, `output_channels()`, or a callable
            on the leaf's path that gives one of these, or None for any. Default None: unstructured.
        axes: a callable on the name and shape of each leaf, ``axes(name, shape) -> Axes``, or None for the default,
            which follows Flax, Haiku and Equinox; see `Axes` and :doc:`/families/axes`. Default None: that for all.
        grow_by: whether growth sees the ``"raw"`` dense gradient (default, as the paper) or the ``"corrected"`` one.
        stagger: whether layers change at different steps, evenly spread over the interval of the topology, so that no
            step does the work of all of them. Each layer still changes once an interval, later by its share of it.
        allow_empty_layers: whether a layer may start without any active weight. By default each gets one, or one block,
            at least, because a network with an empty layer passes nothing on: a warning names the layer, and the
            largest layers give what it gets, so that `sparsity` stays.
        updates: what compact storage returns. ``"arrays"`` (default): arrays like params, as dense storage does.
            ``"sparse"``: objects that hold the active entries and add themselves to a parameter (`SparseUpdate`), for
            a step in which nothing but `optax.apply_updates` sees them: it then costs what the active weights cost.
        dense_updates: True is the former spelling of ``updates="arrays"``.

    Returns:
        A `optax.GradientTransformationExtraArgs`; its update needs `params`, and hands extra arguments on to `inner`.

    Raises:
        ValueError: if `sparsity` is missing or outside [0, 1), `grow_by`, `storage` or `updates` is unknown, or the
            topology cannot work with `storage` or `stagger`; from ``init``, if `where` selects nothing, trees do not
            match, a leaf cannot have the pattern, or the inner optimizer does not fit the topology or the storage;
            from ``update``, if a gradient has not the shape of its parameter.
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
    check_part("topology", topology, "is_due", "agent_optax.rigl()")
    check_pattern(pattern)
    check_axes(axes)
    sparsity = fixed_sparsity(sparsity, pattern)
    if sparsity is None and not callable(pattern) and (masks is None or topology.initial_sparsity is not None):
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
    if stagger and not topology.is_layerwise:
        raise ValueError(f"stagger=True changes layers at different steps, and {topology} needs all of them at once.")
    storing = _chosen_storage(storage, topology, updates, dense_updates)
    key = _random_key(key)
    optimizer = SparseOptimizer(optax.with_extra_args_support(inner), topology, pattern, axes, grow_by, stagger)
    storing.check(optimizer)

    def init(params: optax.Params) -> SparsifyState:
        mask_key, topology_key = jax.random.split(key)
        start = start_of(params, mask_key)
        log_pruned_leaves(params, start.masks)
        active_weights, inner_state = storing.start(optimizer, start, params, key)
        if not topology.is_static:
            _refuse_accumulation(inner_state, topology)
        zero = zero_like(params, jnp.int32)
        num_prunable = sum(mask.size for mask in jax.tree.leaves(start.masks))
        topology_state = topology.init(params, start.masks, start.targets)
        return SparsifyState(
            inner_state=inner_state,
            active_weights=active_weights,
            topology_state=jax.tree.map(lambda array: array + zero.astype(array.dtype), topology_state),
            num_prunable=jnp.asarray(num_prunable, jnp.float32),
            topology_key=jax.random.key_data(topology_key),
            topology_step=jnp.zeros((), jnp.int32),
            num_dropped=jnp.copy(zero),
            num_grown=jnp.copy(zero),
            num_nonzero_inactive=jnp.copy(zero),
            num_topology_updates=jnp.copy(zero),
            num_skipped_updates=jnp.copy(zero),
        )

    def start_of(params: optax.Params, mask_key: jax.Array) -> Start:
        if masks is not None and jax.tree.leaves(params):
            active, originals = copied_masks(params, masks)
            pruned = optimizer.pruned_leaves(params, active)
            frozen = optimizer.frozen_leaves(params, pruned)
            if frozen and not topology.is_static:
                raise ValueError(
                    f"masks= has masks for {', '.join(leaf.name for leaf in frozen)}, which the inner optimizer never "
                    f"updates, and {topology} would drop weights there: give None for them, or use "
                    "agent_optax.static()."
                )
            return given_start(
                params,
                active,
                originals,
                pruned,
                sparsity,
                distribution,
                allow_empty_layers,
                topology,
                storing.needs_counts,
            )
        chosen = prunable(params, where)
        pruned = pruned_among(params, chosen)
        frozen = optimizer.frozen_leaves(params, pruned)
        if frozen:
            leaves, treedef = jax.tree.flatten(chosen)
            for leaf in frozen:
                leaves[leaf.index] = False
            chosen = prunable(params, treedef.unflatten(leaves))
            pruned = pruned_among(params, chosen)
        initial = topology.initial_sparsity
        return random_start(params, pruned, sparsity, initial, distribution, allow_empty_layers, mask_key)

    def pruned_among(params: optax.Params, chosen: Any) -> list[PrunedLeaf]:
        hidden = jax.tree.map(lambda c, p: p if c else optax.MaskedNode(), chosen, params)
        return optimizer.pruned_leaves(params, hidden)

    def take_step(
        grads: optax.Updates,
        state: SparsifyState,
        params: optax.Params,
        numeric: dict[str, Any],
        others: tuple[tuple[str, Any], ...],
    ) -> tuple[optax.Updates, SparsifyState]:
        state = state._replace(topology_step=state.topology_step + 1)
        observed = topology.observe(state.topology_state, *jax.lax.stop_gradient((grads, params)))
        state = state._replace(topology_state=observed)
        return storing.update(optimizer, grads, state, params, {**numeric, **dict(others)})

    compiled_step = jax.jit(take_step, static_argnums=4)  # outside any jit, loops would compile anew at each step

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, SparsifyState]:
        if params is None:
            raise ValueError("sparsify needs the parameters: call tx.update(grads, opt_state, params, ...).")
        check_grads(updates, params)
        numeric, others = split_args(extra_args)
        static = tuple(sorted(others.items()))
        step = compiled_step if _is_hashable(static) else take_step
        new_updates, state = step(updates, state, params, numeric, static)
        return storing.present(new_updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def _chosen_storage(storage: Any, topology: Topology, updates: str, dense_updates: bool) -> Storage:
    """The storage by its name, or the one that the topology brings along."""
    if dense_updates:
        updates = "arrays"
    if updates not in ("arrays", "sparse"):
        raise ValueError(f"updates must be 'arrays' or 'sparse', got {updates!r}.")
    if not isinstance(storage, Storage) and storage not in ("dense", "compact"):
        raise ValueError(f"storage must be 'dense' or 'compact', got {storage!r}; or an agent_optax.typing.Storage.")
    if updates == "sparse" and storage != "compact":
        raise ValueError(
            f"updates='sparse' holds the active entries that storage='compact' keeps, got storage={storage!r}: use "
            "updates='arrays'."
        )
    own = topology.storage()
    if own is None:
        return Compact(updates) if storage == "compact" else Dense() if storage == "dense" else storage
    if storage != "dense":
        raise ValueError(
            f"{topology} keeps weights in whole arrays, in a storage of its own: use storage='dense', got {storage!r}."
        )
    return own


def _refuse_accumulation(inner_state: optax.OptState, topology: Topology) -> None:
    """Raises ValueError if the inner optimizer accumulates gradients, which the topology would not see."""

    def accumulates(node: Any) -> bool:
        return isinstance(node, optax.MultiStepsState)

    if any(accumulates(node) for node in jax.tree.leaves(inner_state, is_leaf=accumulates)):
        raise ValueError(
            f"with optax.MultiSteps inside, {type(topology).__name__} would count micro-batches and grow by the "
            "gradient of the last one: put it outside, optax.MultiSteps(agent_optax.sparsify(...), k), where the "
            "topology sees the mean gradient. A correction goes before both: "
            "optax.chain(agent_optax.correct_gradients(...), optax.MultiSteps(agent_optax.sparsify(...), k))."
        )


def _is_hashable(arg: Any) -> bool:
    try:
        hash(arg)
    except TypeError:
        return False
    return True


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
