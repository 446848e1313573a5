"""What an optimizer state says about correction and sparsity."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import optax

from agent_optax.correction._find import find_corrections
from agent_optax.sparsity._matching import restructured
from agent_optax.sparsity._rewiring import num_nonzero_inactive
from agent_optax.sparsity._state import SparsifyState, named_sparsify


def diagnostics(opt_state: optax.OptState, params: optax.Params | None = None) -> dict[str, jax.Array]:
    r"""Scalars that say how correction and sparsity are doing; cheap, and works under jit.

    Args:
        opt_state: the state of an optimizer that holds `correct_gradients` or `sparsify`, at any depth; of several
            corrections the first is reported.
        params: the parameters, in which to count inactive weights that are not zero. Default None: as counted at the
            last topology update, so 0 before the first, and always 0 with `static`.

    Returns:
        A dictionary. From the correction: ``correlation``, the smoothed c before scaling; ``correction_weight``,
        :math:`w = \gamma c`; ``variance_ratio``, the coefficient's own estimate of the variance of the corrected
        gradient over that of the raw one (for `loss_regression` a stand-in computed from losses), and
        ``variance_ratio_known``, False before anything is measured and for constant coefficients, when the ratio is 1.
        From a correction with a snapshot: ``snapshot_refreshed``, False as long as `refresh` has never run: nothing is
        corrected then, though each step pays for the second gradient.
        From `sparsify`: ``sparsity``, the exact share of inactive weights in pruned leaves; ``exploration_rate``,
        ITOP's :math:`R_s`, the share of weights that were ever active; ``num_dropped`` and ``num_grown``, of the last
        topology update; ``num_nonzero_inactive``, inactive weights that are not zero: more than none means that the run
        did not start from `mask_params`, or that something outside `sparsify` changes its updates;
        ``num_topology_updates`` and ``num_skipped_updates``. With several `sparsify`, for parts of the parameters,
        these are those of all weights together, and numbers are summed; beside them each part has its own, under its
        label in `optax.partition`, ``"actor/sparsity"``, or under its place where that does not tell them apart, such
        as ``"0/sparsity"`` in a chain.

    Raises:
        ValueError: if `opt_state` holds neither.

    Example:
        >>> import agent_optax, jax.numpy as jnp
        >>> tx = agent_optax.sparsify(agent_optax.agent(0.1), agent_optax.rigl(), sparsity=0.75)
        >>> report = agent_optax.diagnostics(tx.init(jnp.ones((4, 4))))
        >>> float(report["sparsity"]), float(report["exploration_rate"]), float(report["correlation"])
        (0.75, 0.25, 0.0)

    References:
        Liu et al., In-Time Over-Parameterization, ICML 2021, for the exploration rate.
    """
    report: dict[str, jax.Array] = {}
    corrections = find_corrections(opt_state)
    if corrections:
        report["correlation"] = corrections[0].coefficient_state.correlation
        report["correction_weight"] = corrections[0].correction_weight()
        report["variance_ratio"], report["variance_ratio_known"] = corrections[0].variance_ratio()
        if corrections[0].memory_state.refresh_point() is not None:
            report["snapshot_refreshed"] = corrections[0].memory_state.is_refreshed
    sparse = named_sparsify(opt_state)
    if sparse:
        report |= _of_sparsity(list(sparse.values()), params)
    if len(sparse) > 1:
        for name, state in sparse.items():
            report |= {f"{name}/{key}": value for key, value in _of_sparsity([state], params).items()}
    if not report:
        raise ValueError(
            "opt_state holds neither a correction nor a sparse optimizer: use agent_optax.correct_gradients, "
            "agent_optax.agent or agent_optax.sparsify."
        )
    return report


def _of_sparsity(states: list[SparsifyState], params: optax.Params | None) -> dict[str, jax.Array]:
    """Of the weights of all of these together."""

    def total(numbers: Iterable[jax.Array]) -> jax.Array:
        return functools.reduce(jnp.add, numbers)

    def nonzero_inactive(state: SparsifyState) -> jax.Array:
        if params is None:
            return state.num_nonzero_inactive
        masks = state.active_masks(params)
        return num_nonzero_inactive(masks, restructured(params, masks))

    num_prunable = total(state.num_prunable for state in states)
    return {
        "sparsity": 1 - total(state.active_weights.num_active() for state in states) / num_prunable,
        "exploration_rate": total(state.active_weights.num_ever_active() for state in states) / num_prunable,
        "num_dropped": total(state.num_dropped for state in states),
        "num_grown": total(state.num_grown for state in states),
        "num_nonzero_inactive": total(map(nonzero_inactive, states)),
        "num_topology_updates": total(state.num_topology_updates for state in states),
        "num_skipped_updates": total(state.num_skipped_updates for state in states),
    }
