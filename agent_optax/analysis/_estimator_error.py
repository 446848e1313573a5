"""How far a corrected gradient is from the full gradient, whatever optimizer corrects it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from agent_optax._tree import check_floating, conform, is_masked, select_active
from agent_optax.analysis._batches import check_batches, dot, tree_total, widened
from agent_optax.correction._evaluate import value_and_grads
from agent_optax.correction._find import StorageView, find_corrections, map_corrections
from agent_optax.correction._state import CorrectGradientsState
from agent_optax.sparsity._state import find_sparsify


class EstimatorError(NamedTuple):
    """What `estimator_error` measures; error_ratio = variance_ratio + bias_ratio."""

    error_ratio: jax.Array  # float []: E|g^ - E g|^2 / E|g - E g|^2
    variance_ratio: jax.Array  # float []: E|g^ - E g^|^2 / E|g - E g|^2
    bias_ratio: jax.Array  # float []: |E g^ - E g|^2 / E|g - E g|^2
    raw_variance: jax.Array  # float []: E|g - E g|^2


def estimator_error(
    loss_fn: Callable[..., Any],
    params: optax.Params,
    opt_state: optax.OptState,
    batches: Any,
    *,
    tx: optax.GradientTransformation | None = None,
    has_aux: bool = False,
) -> EstimatorError:
    r"""The mean squared error of the corrected gradient at a point, relative to that of the raw one.

    .. math::
        \frac{E\lVert \hat g - E g \rVert^2}{E\lVert g - E g \rVert^2}
        = \frac{E\lVert \hat g - E \hat g \rVert^2 + \lVert E \hat g - E g \rVert^2}{E\lVert g - E g \rVert^2},
        \qquad \hat g_B = g_B - w\, (g_{old} - g_{mean})

    with expectations over the batches. Memory, coefficient and scaling are those in the optimizer state, which stays as
    it is: so SVRG, AGENT and gradient regression can be compared at any moment of a run. Below 1 the correction helps.
    The bias is zero when the batches are those of the last refresh of a snapshot; it is not when :math:`g_{mean}` comes
    from other data, from clean data in adversarial training say, or for a memory that is biased by nature
    (`agent_optax.recursion`). It keeps no batch's gradient; under `jax.jit` it is one program, outside it is compiled
    at each call.

    Args:
        loss_fn: ``loss_fn(params, batch) -> loss``, or ``-> (loss, aux)`` with ``has_aux=True``.
        params: a tree of floating-point arrays.
        opt_state: the state of an optimizer that holds `correct_gradients`, at any depth; inside
            `agent_optax.sparsify` of either storage, the gradients of inactive weights take no part. Parameters that
            no correction covers do not count.
        batches: a tree of arrays [N, ...], the leading axis counting batches of equal size; for `agent_optax.table` and
            cached snapshots in the order that ``batch_index`` counts.
        tx: None (default), or a gradient transformation whose output *is* the estimate, with its own state as
            `opt_state`: for corrections that clip, or follow a schedule since the last step, such as
            `agent_optax.mars_correction`. Never a whole optimizer, whose output is a step.
        has_aux: whether `loss_fn` returns ``(loss, aux)``. Default False.

    Returns:
        An `EstimatorError`.

    Raises:
        ValueError: if `opt_state` holds no correction and `tx` is None, `batches` has no common leading axis, or the
            output of `tx` is not like `params`.
        TypeError: if a leaf of `params` is not floating-point.

    Example:
        >>> import agent_optax, jax, jax.numpy as jnp
        >>> from agent_optax import analysis
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch @ params) ** 2)
        >>> batches = jax.random.normal(jax.random.key(0), (50, 8, 3))
        >>> params = jnp.ones(3)
        >>> for name, tx in {"SVRG": agent_optax.svrg(0.1), "AGENT": agent_optax.agent(0.1)}.items():
        ...     opt_state = agent_optax.refresh(loss_fn, params, tx.init(params), batches)
        ...     later = 0.8 * params
        ...     error = analysis.estimator_error(loss_fn, later, opt_state, batches)
        ...     print(f"{name}: {error.error_ratio:.4f}")
        SVRG: 0.0625
        AGENT: 1.0000

        (AGENT's coefficient is still 0 in its first epoch.)

    References:
        Lei et al., Balance is Essence, CPAL 2024, equation (2) and section 4.
    """
    check_floating(params, "agent_optax.analysis")
    num_batches = check_batches(batches)
    if tx is None and not find_corrections(opt_state):
        raise ValueError(
            "opt_state holds no correction to measure: it must come from an optimizer with "
            "agent_optax.correct_gradients, such as agent_optax.agent(0.1); for another gradient transformation pass "
            "it as tx=, with its own state."
        )
    evaluate = value_and_grads(loss_fn, has_aux)

    def raw_and_estimate(index: jax.Array, batch: Any) -> tuple[Any, Any]:
        (_, grads), extras = evaluate(params, opt_state, batch)
        extras = {**extras, "batch_index": index}
        if tx is None:
            pairs = _estimates(opt_state, params, grads, extras)
        else:
            updates, _ = optax.with_extra_args_support(tx).update(grads, opt_state, params, **extras)
            if find_sparsify(opt_state) or jax.tree.map(jnp.shape, updates) != jax.tree.map(jnp.shape, grads):
                raise ValueError(
                    "the output of tx must be an estimate of the gradient, with the shapes of params: pass the "
                    "correction itself, such as agent_optax.correct_gradients(...), not an optimizer around it."
                )
            pairs = [(grads, updates)]
        return tuple(widened([pair[i] for pair in pairs]) for i in (0, 1))  # type: ignore[return-value]

    first = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf)[1:], jnp.result_type(leaf)), batches)
    shapes, _ = jax.eval_shape(raw_and_estimate, jax.ShapeDtypeStruct((), jnp.int32), first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add_batch(carry: tuple[Any, ...], indexed: tuple[jax.Array, Any]) -> tuple[tuple[Any, ...], None]:
        index, batch = indexed
        raw_mean, mean, raw_variance, variance = carry
        raw, estimate = raw_and_estimate(index, batch)
        raw_mean, raw_added = _deviate(index, raw_mean, raw)
        mean, added = _deviate(index, mean, estimate)
        return (raw_mean, mean, raw_variance + raw_added, variance + added), None

    scalar = jnp.zeros_like(tree_total(jax.tree.map(jnp.sum, zeros)))
    indexed = (jnp.arange(num_batches, dtype=jnp.int32), batches)
    (raw_mean, mean, raw_variance, variance), _ = jax.lax.scan(add_batch, (zeros, zeros, scalar, scalar), indexed)
    raw_variance, variance = raw_variance / num_batches, variance / num_batches
    bias = jax.tree.map(jnp.subtract, mean, raw_mean)
    squared_bias = tree_total(jax.tree.map(lambda b: dot(b, b), bias))
    return EstimatorError(
        error_ratio=(variance + squared_bias) / raw_variance,
        variance_ratio=variance / raw_variance,
        bias_ratio=squared_bias / raw_variance,
        raw_variance=raw_variance,
    )


def _deviate(index: jax.Array, mean: Any, new: Any) -> tuple[Any, jax.Array]:
    """The mean with the n-th vector in it, and what that adds to the sum of squared deviations (Welford)."""
    deviation = jax.tree.map(jnp.subtract, new, mean)
    mean = jax.tree.map(lambda m, d: m + d / (index + 1).astype(m.dtype), mean, deviation)
    squares = tree_total(jax.tree.map(lambda d: dot(d, d), deviation))
    return mean, squares * (1 - 1 / (index + 1).astype(squares.dtype))


def _estimates(
    opt_state: optax.OptState, params: optax.Params, grads: optax.Updates, extras: dict[str, Any]
) -> list[tuple[optax.Updates, optax.Updates]]:
    """The raw and the corrected gradient that each correction in the state would make, in its own storage."""
    pairs = []

    def collect(state: CorrectGradientsState, view: StorageView) -> CorrectGradientsState:
        seen, args = view.step_args(grads, params, extras)
        raw = _as_covered(state.memory_state, seen)
        corrected = state.correct(raw, state.memory_state.recall(raw, args))
        masks = args.get(
            "active_masks"
        )  # where there are any, the mean gradient of an inactive weight need not be zero
        pairs.append((raw, corrected if masks is None else select_active(corrected, conform(masks, corrected))))
        return state

    map_corrections(collect, opt_state)
    return pairs


def _as_covered(memory_state: Any, grads: optax.Updates) -> optax.Updates:
    """Without the leaves that an outer `optax.masked` or `optax.partition` hides from the memory."""
    for field in memory_state:
        if any(is_masked(node) for node in jax.tree.leaves(field, is_leaf=is_masked)):
            return conform(grads, field)
    return grads
