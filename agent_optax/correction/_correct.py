"""The corrected gradient: g^ = g_new - w (g_old - g_mean)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

from agent_optax._tree import check_floating, conform, select_active, statistics_dtype
from agent_optax._validation import check_number, check_part
from agent_optax.correction._coefficient import Coefficient
from agent_optax.correction._memory import Memory
from agent_optax.correction._state import CorrectGradientsState
from agent_optax.correction.memories._snapshot import snapshot


def correct_gradients(
    memory: Memory | None = None,
    coefficient: Coefficient | None = None,
    scaling: float = 0.1,
) -> optax.GradientTransformationExtraArgs:
    r"""Corrects the gradient with an old one: the control variate of AGENT, SVRG, SAGA and STORM in one formula.

    .. math::
        \hat g_t = g_{new} - w_t\, (g_{old} - g_{mean}), \qquad w_t = \gamma\, c_t

    This is equation (2) of the paper. The *memory* says where :math:`g_{old}` and :math:`g_{mean}` come from, the
    *coefficient* chooses :math:`c_t`. Put it first in an `optax.chain`: weight decay and momentum then act on the
    corrected gradient, as in the paper.

    Args:
        memory: `snapshot()` (default) or `recursion()`, with a second gradient a step; `snapshot(cached_batches=N)`,
            `table(N)` or `history()`, with none.
        coefficient: `loss_regression()`, `gradient_regression()`, `constant(c)` or `scheduled(schedule)`. Default:
            `loss_regression()`, the paper's, for snapshot and recursion; `gradient_regression()` for table and history.
        scaling: :math:`\gamma`, no unit. Default 0.1 (the paper); take 1.0 with `gradient_regression`.

    Returns:
        A `optax.GradientTransformationExtraArgs`. What `update` needs depends on the memory: ``old_grads=``, a tree
        like the gradient, as `value_and_grads` gives it (snapshot, recursion); `params` (recursion); ``batch_index=``
        (table, cached snapshot). `loss_regression` needs ``value=`` and ``old_value=`` where there is no refresh. Other
        extra arguments are accepted and ignored.

    Raises:
        ValueError: if `scaling` is not finite; from `update`, if an extra argument is missing.
        TypeError: if `memory` or `coefficient` is not one; from `init`, if a parameter is not floating-point.

    Example:
        >>> import agent_optax, jax, jax.numpy as jnp, optax
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch @ params["w"]) ** 2)
        >>> tx = optax.chain(
        ...     agent_optax.correct_gradients(agent_optax.snapshot(), agent_optax.gradient_regression(), scaling=1.0),
        ...     optax.sgd(0.1),
        ... )
        >>> params = {"w": jnp.ones(3)}
        >>> opt_state = tx.init(params)
        >>> batches = jax.random.normal(jax.random.key(0), (4, 8, 3))
        >>> opt_state = agent_optax.refresh(loss_fn, params, opt_state, batches)
        >>> (value, grads), extras = agent_optax.value_and_grads(loss_fn)(params, opt_state, batches[0])
        >>> updates, opt_state = tx.update(grads, opt_state, params, **extras)
        >>> float(agent_optax.diagnostics(opt_state)["correlation"])
        1.0

    References:
        Lei et al., Balance is Essence, CPAL 2024, equation (2) and Algorithm 1.
    """
    remembering: Memory = snapshot() if memory is None else memory
    check_part("memory", remembering, "remember", "agent_optax.snapshot()")
    choosing: Coefficient = remembering.default_coefficient() if coefficient is None else coefficient
    check_part("coefficient", choosing, "observe", "agent_optax.constant(1.0)")
    check_number("scaling", scaling, "the paper takes 0.1; 1.0 subtracts the whole estimate")

    def init(params: optax.Params) -> CorrectGradientsState:
        check_floating(params, "correct_gradients")
        return CorrectGradientsState(
            memory_state=remembering.init(params),
            coefficient_state=choosing.init(params),
            correction_scaling=jnp.asarray(scaling, statistics_dtype(params)),
        )

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        active_masks: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, CorrectGradientsState]:
        state = state._replace(
            coefficient_state=choosing.prepare(state.coefficient_state),
            correction_scaling=jnp.asarray(scaling, state.correction_scaling.dtype),
        )
        if active_masks is not None:
            active_masks = conform(active_masks, updates)
        grads = select_active(updates, active_masks)
        recalled = state.memory_state.recall(updates, extra_args)
        # Inactive entries take no part: neither in inner products nor in what the chain does next, such as clipping.
        # One selection, from the sum, is cheaper than one from each of its terms.
        corrected = select_active(state.correct(updates, recalled), active_masks)
        recalled = recalled._replace(
            old_grads=select_active(recalled.old_grads, active_masks),
            mean_grads=select_active(recalled.mean_grads, active_masks),
        )
        coefficient_state = choosing.observe(state.coefficient_state, grads, recalled, extra_args)
        memory_state = remembering.remember(state.memory_state, recalled, grads, corrected, params, extra_args)
        return corrected, state._replace(memory_state=memory_state, coefficient_state=coefficient_state)

    return optax.GradientTransformationExtraArgs(init, update)
