"""Values and gradients, with the extra arguments that the correction needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from agent_optax._tree import is_masked
from agent_optax.correction._find import map_corrections
from agent_optax.correction._layout import at_point, from_point


def evaluation_point(opt_state: optax.OptState, params: optax.Params) -> optax.Params | None:
    """The dense parameters at which the memories in `opt_state` need the old gradient; None if none does.

    Parameters that no memory covers (hidden by `optax.masked` or `optax.partition`) stay as in `params`.
    """
    return _merged_points(opt_state, params, lambda memory_state: memory_state.evaluation_point())


def snapshot_point(opt_state: optax.OptState, params: optax.Params) -> optax.Params | None:
    """The dense parameters at which the snapshots in `opt_state` lie; None if there is no snapshot."""
    return _merged_points(opt_state, params, lambda memory_state: memory_state.refresh_point())


def _merged_points(
    opt_state: optax.OptState, params: optax.Params, point_of: Callable[[Any], optax.Params | None]
) -> optax.Params | None:
    points = []

    def collect(state: Any, view: Any) -> Any:
        point = point_of(state.memory_state)
        if point is not None:
            points.append(view.scatter_point(point, params))
        return state

    map_corrections(collect, opt_state)
    if not points:
        return None
    merged = jax.tree.map(lambda _: optax.MaskedNode(), params)
    for point in points:
        merged = jax.tree.map(_only_one, point, merged, is_leaf=is_masked)
    return jax.tree.map(lambda old, p: p if is_masked(old) else old, merged, params, is_leaf=is_masked)


def _only_one(point: Any, other: Any) -> Any:
    if is_masked(point) or is_masked(other):
        return other if is_masked(point) else point
    raise ValueError(
        "two corrections in opt_state want the old gradient of the same parameter, each at its own old parameters, "
        "but update is given one old gradient. Keep one of them, or give each its own parameters with optax.partition."
    )


def value_and_grads(loss_fn: Callable[..., Any], has_aux: bool = False) -> Callable[..., Any]:
    r"""Like `jax.value_and_grad`, and also the old gradient on the same batch when the optimizer needs it.

    .. math::
        \ell(B_t|\theta_t),\ g_{new} = \nabla\ell(B_t|\theta_t),\
        \ell(B_t|\theta_{old}),\ g_{old} = \nabla\ell(B_t|\theta_{old})

    What is needed is read off the optimizer state: `snapshot` and `recursion` ask for a second gradient; `table`, a
    snapshot with `cached_batches`, `history`, or an optimizer with no correction at all, for none.

    Args:
        loss_fn: ``loss_fn(params, *args) -> loss``, or ``-> (loss, aux)`` with ``has_aux=True``. The old gradient is
            taken with the same `args`, so with the same batch and the same random key; only connections of sparse
            layers (`agent_optax.layers.rewire`) are those of the old parameters.
        has_aux: whether `loss_fn` returns ``(loss, aux)``, as in `jax.value_and_grad`. The auxiliary output of the
            second evaluation is dropped: it never touches BatchNorm statistics.

    Returns:
        A function ``(params, opt_state, *args) -> ((value, grads), extras)``, with ``((value, aux), grads)`` for
        ``has_aux=True``. `extras` holds ``value`` and, when needed, ``old_value`` and ``old_grads``; hand it on with
        ``tx.update(grads, opt_state, params, **extras)``.

    Raises:
        TypeError: from `jax.value_and_grad`, when the loss is not a real scalar.
        ValueError: from the function, when two corrections want old gradients of the same parameter.

    Example:
        >>> import agent_optax, jax.numpy as jnp
        >>> tx = agent_optax.agent(learning_rate=0.1)
        >>> params = jnp.ones(3)
        >>> opt_state = tx.init(params)
        >>> grads_fn = agent_optax.value_and_grads(lambda params, batch: jnp.sum(params * batch))
        >>> (value, grads), extras = grads_fn(params, opt_state, jnp.arange(3.0))
        >>> sorted(extras)
        ['old_grads', 'old_value', 'value']
    """
    evaluate = jax.value_and_grad(loss_fn, has_aux=has_aux)

    def values_and_grads(params: optax.Params, opt_state: optax.OptState, *args: Any, **kwargs: Any) -> Any:
        output, grads = evaluate(params, *args, **kwargs)
        extras = {"value": output[0] if has_aux else output}
        point = evaluation_point(opt_state, params)
        if point is not None:
            old_args, old_kwargs = at_point((args, kwargs), opt_state)
            old_output, old_grads = evaluate(point, *old_args, **old_kwargs)
            old_grads = from_point(old_grads, (args, kwargs), opt_state)
            extras.update(old_value=old_output[0] if has_aux else old_output, old_grads=old_grads)
        return (output, grads), extras

    return values_and_grads
