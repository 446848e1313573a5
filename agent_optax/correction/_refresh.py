"""The refresh: once an epoch the coefficient is measured and the snapshot moves."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from agent_optax._tree import all_finite, conform, statistics_dtype
from agent_optax.correction._evaluate import evaluation_point
from agent_optax.correction._find import find_corrections, map_corrections
from agent_optax.correction._state import CorrectGradientsState


def refresh(
    loss_fn: Callable[..., Any],
    params: optax.Params,
    opt_state: optax.OptState,
    batches: Any,
    has_aux: bool = False,
) -> optax.OptState:
    r"""Moves the snapshot to `params`: the beginning of an epoch in Algorithm 1.

    .. math::
        c \leftarrow (1-\alpha)\, c + \alpha\, \hat c \ \text{(eq. 4, at the old snapshot)}, \qquad
        \tilde\theta \leftarrow \theta_t, \qquad
        \tilde g \leftarrow \frac1N \sum_i \nabla\ell(B_i|\tilde\theta)

    The losses at the old snapshot are evaluated only when the coefficient regresses losses.

    Args:
        loss_fn: ``loss_fn(params, batch) -> loss``, or ``-> (loss, aux)`` with ``has_aux=True``. Auxiliary output
            (BatchNorm statistics, say) is dropped. It must be the same function at each call, or the pass compiles
            anew.
        params: the current parameters.
        opt_state: the state of an optimizer that holds `correct_gradients` with a snapshot memory, at any depth.
        batches: a tree of arrays with a leading axis [N, ...] of N batches of equal size, scanned on the device; or
            an iterator of N batches of equal size (a host loop: a data loader, a generator, ``iter([...])``). Fewer
            batches than the data set has are a sub-sample: cheaper, and worse.
        has_aux: whether `loss_fn` returns ``(loss, aux)``.

    Returns:
        The optimizer state with the new snapshot, mean gradient and coefficient. When the mean gradient is not
        finite the snapshot stays where it was.

    Raises:
        ValueError: if `opt_state` has no snapshot to refresh, or `batches` is empty or of unequal sizes.

    Example:
        >>> import agent_optax, jax.numpy as jnp
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch - params) ** 2)
        >>> params = jnp.zeros(2)
        >>> opt_state = agent_optax.agent(learning_rate=0.1).init(params)
        >>> opt_state = agent_optax.refresh(loss_fn, params, opt_state, jnp.ones((5, 8, 2)))
        >>> agent_optax.snapshot_params(opt_state, params)
        Array([0., 0.], dtype=float32)

    References:
        Lei et al., Balance is Essence, CPAL 2024, Algorithm 1.
    """
    if not _refreshable(opt_state):
        memories = [type(state.memory_state).__name__ for state in find_corrections(opt_state)]
        found = f"only {', '.join(memories)}" if memories else "no correct_gradients at all"
        raise ValueError(
            f"refresh needs a snapshot, but opt_state holds {found}. Build the optimizer with "
            "agent_optax.correct_gradients(memory=agent_optax.snapshot()), or leave the call to refresh out."
        )
    if _is_stacked(batches):
        _check_stacked(batches)
        return _scan_pass(loss_fn, has_aux, params, opt_state, batches)
    return _host_pass(loss_fn, has_aux, params, opt_state, batches)


def snapshot_params(opt_state: optax.OptState, params: optax.Params) -> optax.Params:
    r"""The snapshot :math:`\tilde\theta` in `opt_state`, dense whatever the storage.

    Args:
        opt_state: the state of an optimizer that holds `correct_gradients` with a snapshot memory.
        params: the current parameters, for the shapes, and for leaves that no memory covers.

    Returns:
        A tree like `params`.

    Raises:
        ValueError: if `opt_state` has no snapshot.

    Example:
        >>> import agent_optax, jax.numpy as jnp
        >>> opt_state = agent_optax.agent(learning_rate=0.1).init(jnp.ones(2))
        >>> agent_optax.snapshot_params(opt_state, jnp.zeros(2))
        Array([1., 1.], dtype=float32)
    """
    point = evaluation_point(opt_state, params)
    if point is None:
        raise ValueError(
            "opt_state holds no snapshot. Build the optimizer with "
            "agent_optax.correct_gradients(memory=agent_optax.snapshot())."
        )
    return point


def _refreshable(opt_state: optax.OptState) -> list[CorrectGradientsState]:
    return [state for state in find_corrections(opt_state) if hasattr(state.memory_state, "refreshed")]


def _is_stacked(batches: Any) -> bool:
    leaves = jax.tree.leaves(batches)
    return bool(leaves) and all(isinstance(leaf, (jax.Array, np.ndarray)) for leaf in leaves)


def _check_stacked(batches: Any) -> None:
    counts = {jax.tree_util.keystr(path): leaf.shape[:1] for path, leaf in jax.tree_util.tree_leaves_with_path(batches)}
    if len(set(counts.values())) != 1 or () in counts.values() or (0,) in counts.values():
        raise ValueError(
            "stacked batches need one leading axis of the same, non-zero length in every leaf, got lengths "
            f"{ {name: shape[0] if shape else 'none' for name, shape in counts.items()} }. For a sequence of separate "
            "batches pass an iterator, such as iter(list_of_batches)."
        )


def _sums_like(params: optax.Params, opt_state: optax.OptState) -> list[optax.Updates]:
    """Zeros for the sum of gradients of each refreshable memory, in the memory's own storage, at least float32."""
    return [
        jax.tree.map(
            lambda x: jnp.zeros_like(x, dtype=jnp.promote_types(x.dtype, jnp.float32)), s.memory_state.mean_grads
        )
        for s in _refreshable(opt_state)
    ]


def _add_batch(loss_fn, has_aux, params, opt_state, sums, batch):
    """Adds one batch to the sums of gradients; returns its loss here and at the old snapshot."""
    output, grads = jax.value_and_grad(loss_fn, has_aux=has_aux)(params, batch)
    loss = output[0] if has_aux else output
    if any(state.coefficient_state.needs_loss_pairs() for state in _refreshable(opt_state)):
        old_output = loss_fn(evaluation_point(opt_state, params), batch)
        old_loss = old_output[0] if has_aux else old_output
    else:
        old_loss = loss
    added = []
    remaining = list(sums)

    def add(state, view):
        if hasattr(state.memory_state, "refreshed"):
            total = remaining.pop(0)
            added.append(jax.tree.map(lambda t, g: t + g, total, conform(view.gather(grads), total)))
        return state

    map_corrections(add, opt_state)
    dtype = statistics_dtype(params)
    return added, (loss.astype(dtype), old_loss.astype(dtype))


def _finish(params, opt_state, sums, losses, old_losses):
    """The refreshed state: the coefficient first, while the snapshot is still the old one."""
    remaining = list(sums)

    def renew(state, view):
        if not hasattr(state.memory_state, "refreshed"):
            return state
        memory_state = state.memory_state
        mean_grads = jax.tree.map(lambda t: t / losses.shape[0], remaining.pop(0))
        return state._replace(
            coefficient_state=state.coefficient_state.refreshed(losses, old_losses, ~memory_state.is_refreshed),
            memory_state=memory_state.refreshed(view.gather(params), mean_grads),
        )

    usable = all_finite(sums) & jnp.all(jnp.isfinite(losses))
    renewed = map_corrections(renew, opt_state, moves_points=True)
    return jax.tree.map(lambda new, old: new if new is old else jnp.where(usable, new, old), renewed, opt_state)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scan_pass(loss_fn, has_aux, params, opt_state, batches):
    def body(sums, batch):
        return _add_batch(loss_fn, has_aux, params, opt_state, sums, batch)

    sums, (losses, old_losses) = jax.lax.scan(body, _sums_like(params, opt_state), batches)
    return _finish(params, opt_state, sums, losses, old_losses)


_jit_add_batch = jax.jit(_add_batch, static_argnums=(0, 1), donate_argnums=4)
_jit_finish = jax.jit(_finish)


def _host_pass(loss_fn, has_aux, params, opt_state, batches: Iterable[Any]):
    sums, pairs, shapes = _sums_like(params, opt_state), [], None
    for index, batch in enumerate(batches):
        batch_shapes = jax.tree.map(np.shape, batch)
        if shapes is None:
            shapes = batch_shapes
        elif batch_shapes != shapes:
            raise ValueError(
                f"batches must be of equal size for their mean to be the mean over samples: batch 0 has shapes "
                f"{shapes}, batch {index} has {batch_shapes}. Drop the remainder of the data set, or pad it."
            )
        sums, pair = _jit_add_batch(loss_fn, has_aux, params, opt_state, sums, batch)
        pairs.append(pair)
    if not pairs:
        raise ValueError("refresh got no batch: the iterator is empty, or was used up by an earlier pass.")
    losses, old_losses = (jnp.stack(column) for column in zip(*pairs, strict=True))
    return _jit_finish(params, opt_state, sums, losses, old_losses)
