"""The refresh: once an epoch the coefficient is measured and the snapshot moves."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from agent_optax._tree import all_finite, conform, statistics_dtype, wide_dtype
from agent_optax.correction._evaluate import snapshot_point
from agent_optax.correction._find import find_corrections, map_corrections
from agent_optax.correction._layout import at_point
from agent_optax.correction._state import CorrectGradientsState
from agent_optax.correction.memories._rows import put_row


def refresh(
    loss_fn: Callable[..., Any],
    params: optax.Params,
    opt_state: optax.OptState,
    batches: Any,
    has_aux: bool = False,
    args: tuple[Any, ...] = (),
) -> optax.OptState:
    r"""Moves the snapshot to `params`: the beginning of an epoch in Algorithm 1.

    .. math::
        c \leftarrow (1-\alpha)\, c + \alpha\, \hat c \ \text{(eq. 4, at the old snapshot)}, \qquad
        \tilde\theta \leftarrow \theta_t, \qquad
        \tilde g \leftarrow \frac1N \sum_i \nabla\ell(B_i|\tilde\theta)

    The losses at the old snapshot are evaluated only when the coefficient regresses losses, and are not already
    cached. With ``snapshot(cached_batches=N)`` the pass must have exactly N batches, and keeps their gradients.

    Args:
        loss_fn: ``loss_fn(params, batch, *args) -> loss``, or ``-> (loss, aux)`` with ``has_aux=True``. Auxiliary
            output (BatchNorm statistics, say) is dropped. It must be the same function at each call, or the pass
            compiles anew.
        params: the current parameters.
        opt_state: the state of an optimizer that holds `correct_gradients` with a snapshot memory, at any depth.
        batches: a tree of arrays with a leading axis [N, ...] of N batches of equal size, scanned on the device; or
            an iterator of N batches of equal size (a host loop: a data loader, a generator, ``iter([...])``). Fewer
            batches than the data set has are a sub-sample: cheaper, and worse.
        has_aux: whether `loss_fn` returns ``(loss, aux)``.
        args: what `loss_fn` takes after the batch, trees of arrays that are the same for each batch, such as BatchNorm
            statistics. Default: nothing. A closure over arrays that change would compile the pass anew.

    Returns:
        The optimizer state with the new snapshot, mean gradient and coefficient. When the mean gradient is not
        finite the snapshot stays where it was.

    Raises:
        ValueError: if `opt_state` has no snapshot to refresh; if `batches` is empty, of unequal sizes, or of another
            number than the snapshot caches.
        TypeError: if `batches` is neither arrays nor an iterator.

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
        _check_cached(opt_state, jax.tree.leaves(batches)[0].shape[0])
        return _scan_pass(loss_fn, has_aux, params, opt_state, batches, args)
    if not isinstance(batches, Iterable):
        raise TypeError(
            "batches must be a tree of arrays with a leading axis of batches, or an iterator of batches, got "
            f"{batches!r}."
        )
    return _host_pass(loss_fn, has_aux, params, opt_state, batches, args)


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
    point = snapshot_point(opt_state, params)
    if point is None:
        raise ValueError(
            "opt_state holds no snapshot. Build the optimizer with "
            "agent_optax.correct_gradients(memory=agent_optax.snapshot())."
        )
    return point


def _refreshable(opt_state: optax.OptState) -> list[CorrectGradientsState]:
    return [state for state in find_corrections(opt_state) if state.memory_state.refresh_point() is not None]


def _is_stacked(batches: Any) -> bool:
    if isinstance(batches, Iterator):  # JAX warns of one as a leaf
        return False
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


def _check_cached(opt_state: optax.OptState, num_batches: int, is_lower_bound: bool = False) -> None:
    for state in _refreshable(opt_state):
        cached = state.memory_state.num_cached_batches()
        if cached is not None and (cached < num_batches if is_lower_bound else cached != num_batches):
            raise ValueError(
                f"the refresh pass has {'at least ' if is_lower_bound else ''}{num_batches} batches, but the memory is "
                f"snapshot(cached_batches={cached}). Pass exactly the {cached} batches of an epoch, in the order that "
                "batch_index counts, or build the optimizer with cached_batches set to their number."
            )


def _sums_like(params: optax.Params, opt_state: optax.OptState) -> list[optax.Updates]:
    """Zeros for the sum of gradients of each refreshable memory, in the memory's own storage, at least float32."""
    return [
        jax.tree.map(lambda x: jnp.zeros_like(x, dtype=wide_dtype(x.dtype)), s.memory_state.mean_grads)
        for s in _refreshable(opt_state)
    ]


def _needs_old_losses(state: CorrectGradientsState) -> bool:
    """Whether the losses at the old snapshot have to be evaluated; those of cached batches are known."""
    return state.memory_state.num_cached_batches() is None and state.coefficient_state.needs_loss_pairs()


def _add_batch(loss_fn, has_aux, params, opt_state, sums, inputs):
    """Adds one batch, the first of the `inputs` of `loss_fn` beside params, to the sums of gradients.

    Returns the sums; the gradients to keep, for each memory that caches; the loss here and at the old snapshot.
    """
    output, grads = jax.value_and_grad(loss_fn, has_aux=has_aux)(params, *inputs)
    loss = output[0] if has_aux else output
    if any(_needs_old_losses(state) for state in _refreshable(opt_state)):
        old_output = loss_fn(snapshot_point(opt_state, params), *at_point(inputs, opt_state))
        old_loss = old_output[0] if has_aux else old_output
    else:
        old_loss = loss
    added, kept = [], []
    remaining = list(sums)

    def add(state, view):
        if state.memory_state.refresh_point() is not None:
            total = remaining.pop(0)
            batch_grads = conform(view.gather(grads), total)
            added.append(jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, batch_grads))
            if state.memory_state.num_cached_batches() is not None:
                rows = state.memory_state.cached_grads
                kept.append(jax.tree.map(lambda g, row: g.astype(row.dtype), batch_grads, rows))
        return state

    map_corrections(add, opt_state)
    dtype = statistics_dtype(params)
    return added, kept, (loss.astype(dtype), old_loss.astype(dtype))


def _finish(params, opt_state, sums, rows, losses, old_losses):
    """The refreshed state: the coefficient first, while the snapshot is still the old one."""
    remaining, remaining_rows = list(sums), list(rows)

    def renew(state, view):
        if state.memory_state.refresh_point() is None:
            return state
        memory_state = state.memory_state
        is_caching = memory_state.num_cached_batches() is not None
        old = memory_state.cached_losses if is_caching else old_losses
        mean_grads = jax.tree.map(lambda t: t / losses.shape[0], remaining.pop(0))
        batch_grads = remaining_rows.pop(0) if is_caching else None
        return state._replace(
            coefficient_state=state.coefficient_state.refreshed(losses, old, ~memory_state.is_refreshed),
            memory_state=memory_state.refreshed(view.gather(params), mean_grads, batch_grads, losses),
        )

    usable = all_finite(sums) & jnp.all(jnp.isfinite(losses))
    renewed = map_corrections(renew, opt_state, moves_points=True)
    return jax.tree.map(lambda new, old: new if new is old else jnp.where(usable, new, old), renewed, opt_state)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scan_pass(loss_fn, has_aux, params, opt_state, batches, args):
    def body(sums, batch):
        sums, rows, losses = _add_batch(loss_fn, has_aux, params, opt_state, sums, (batch, *args))
        return sums, (rows, losses)  # rows are outputs, not carried: a carried table is copied in every iteration

    sums, (rows, (losses, old_losses)) = jax.lax.scan(body, _sums_like(params, opt_state), batches)
    return _finish(params, opt_state, sums, rows, losses, old_losses)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(4, 5))
def _jit_add_batch(loss_fn, has_aux, params, opt_state, sums, rows, inputs, index):
    sums, kept, pair = _add_batch(loss_fn, has_aux, params, opt_state, sums, inputs)
    return sums, [put_row(table, row, index) for table, row in zip(rows, kept, strict=True)], pair


_jit_finish = jax.jit(_finish)


def _host_pass(loss_fn, has_aux, params, opt_state, batches: Iterable[Any], args):
    sums, pairs, shapes = _sums_like(params, opt_state), [], None
    rows = [
        jax.tree.map(jnp.zeros_like, state.memory_state.cached_grads)
        for state in _refreshable(opt_state)
        if state.memory_state.num_cached_batches() is not None
    ]
    for index, batch in enumerate(batches):
        _check_cached(opt_state, index + 1, is_lower_bound=True)
        batch_shapes = jax.tree.map(np.shape, batch)
        if shapes is None:
            shapes = batch_shapes
        elif batch_shapes != shapes:
            raise ValueError(
                f"batches must be of equal size for their mean to be the mean over samples: batch 0 has shapes "
                f"{shapes}, batch {index} has {batch_shapes}. Drop the remainder of the data set, or pad it."
            )
        inputs = (batch, *args)
        sums, rows, pair = _jit_add_batch(loss_fn, has_aux, params, opt_state, sums, rows, inputs, jnp.asarray(index))
        pairs.append(pair)
    if not pairs:
        raise ValueError("refresh got no batch: the iterator is empty, or was used up by an earlier pass.")
    _check_cached(opt_state, len(pairs))
    losses, old_losses = (jnp.stack(column) for column in zip(*pairs, strict=True))
    return _jit_finish(params, opt_state, sums, rows, losses, old_losses)
