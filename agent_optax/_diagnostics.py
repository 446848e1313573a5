"""What an optimizer state says about correction and sparsity."""

from __future__ import annotations

import jax
import optax

from agent_optax.correction._find import find_corrections
from agent_optax.sparsity._matching import restructured
from agent_optax.sparsity._rewiring import num_nonzero_inactive
from agent_optax.sparsity._state import find_sparsify


def diagnostics(opt_state: optax.OptState, params: optax.Params | None = None) -> dict[str, jax.Array]:
    r"""Scalars that say how correction and sparsity are doing; cheap, and works under jit.

    Args:
        opt_state: the state of an optimizer that holds `correct_gradients` or `sparsify`, at any depth; the first of
            each is reported.
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
        ``num_topology_updates`` and ``num_skipped_updates``.

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
    sparse = find_sparsify(opt_state)
    if sparse:
        state = sparse[0]
        report["sparsity"] = state.sparsity()
        report["exploration_rate"] = state.exploration_rate()
        report["num_dropped"] = state.num_dropped
        report["num_grown"] = state.num_grown
        if params is None:
            report["num_nonzero_inactive"] = state.num_nonzero_inactive
        else:
            masks = state.active_masks(params)
            report["num_nonzero_inactive"] = num_nonzero_inactive(masks, restructured(params, masks))
        report["num_topology_updates"] = state.num_topology_updates
        report["num_skipped_updates"] = state.num_skipped_updates
    if not report:
        raise ValueError(
            "opt_state holds neither a correction nor a sparse optimizer: use agent_optax.correct_gradients, "
            "agent_optax.agent or agent_optax.sparsify."
        )
    return report
