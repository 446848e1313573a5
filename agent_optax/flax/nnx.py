"""Flax NNX: corrected gradients and sparse weights for `flax.nnx.Optimizer`, and sparse layers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import agent_optax
from agent_optax.correction._evaluate import evaluation_point
from agent_optax.correction._layout import at_point, from_point
from agent_optax.flax._files_nnx import load_safetensors, save_safetensors
from agent_optax.flax._optimizer_nnx import arrays_of, check_optimizer, opt_state, params_of
from agent_optax.flax._rewire_nnx import prepare_rewiring, rewire
from agent_optax.flax._sparse_nnx import SparseConnections, SparseConv, SparseLinear
from agent_optax.flax._swap_nnx import sparse_layers, to_dense_layers, to_sparse_layers

__all__ = [
    "value_and_grads",
    "refresh",
    "rewire",
    "prepare_rewiring",
    "mask_model",
    "opt_state",
    "SparseLinear",
    "SparseConv",
    "SparseConnections",
    "sparse_layers",
    "to_sparse_layers",
    "to_dense_layers",
    "save_safetensors",
    "load_safetensors",
]


def value_and_grads(loss_fn: Callable[..., Any], has_aux: bool = False) -> Callable[..., Any]:
    r"""Like `flax.nnx.value_and_grad`, and also the old gradient on the same batch when the optimizer needs it.

    .. math::
        \ell(B_t|\theta_t),\ g_{new} = \nabla\ell(B_t|\theta_t),\
        \ell(B_t|\theta_{old}),\ g_{old} = \nabla\ell(B_t|\theta_{old})

    The first evaluation does to the model what the loss function does: BatchNorm statistics move, random counters
    advance. The second runs on a copy of the model as it was before, with the old parameters in it: it draws the same
    dropout mask, and leaves no trace.

    Args:
        loss_fn: ``loss_fn(model, *args) -> loss``, or ``-> (loss, aux)`` with ``has_aux=True``.
        has_aux: whether `loss_fn` returns ``(loss, aux)``. The auxiliary output of the second evaluation is dropped.

    Returns:
        A function ``(model, optimizer, *args) -> ((value, grads), extras)``, with ``((value, aux), grads)`` for
        ``has_aux=True``. Gradients are taken with respect to ``optimizer.wrt``. Hand all of it on with
        ``optimizer.update(model, grads, **extras)``.

    Raises:
        TypeError: from the function, if the optimizer is no `flax.nnx.Optimizer`; from JAX, when the loss is not a
            real scalar.
        ValueError: from the function, when two corrections want old gradients of the same parameter.

    Example:
        >>> import agent_optax, agent_optax.flax, jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        >>> optimizer = nnx.Optimizer(model, agent_optax.agent(0.1), wrt=nnx.Param)
        >>> def loss_fn(model, batch):
        ...     return jnp.mean((model(batch) - 1.0) ** 2)
        >>> grads_fn = agent_optax.flax.nnx.value_and_grads(loss_fn)
        >>> @nnx.jit
        ... def step(model, optimizer, batch):
        ...     (value, grads), extras = grads_fn(model, optimizer, batch)
        ...     optimizer.update(model, grads, **extras)
        ...     return value
        >>> batches = jax.random.normal(jax.random.key(0), (4, 8, 3))
        >>> agent_optax.flax.nnx.refresh(loss_fn, model, optimizer, batches)
        >>> values = [float(step(model, optimizer, batches[0])) for _ in range(20)]
        >>> values[-1] < values[0]
        True
    """

    def values_and_grads(model: Any, optimizer: nnx.Optimizer, *args: Any, **kwargs: Any) -> Any:
        check_optimizer(optimizer)
        evaluate = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, optimizer.wrt), has_aux=has_aux)
        point = evaluation_point(opt_state(optimizer), params_of(model, optimizer))
        if point is None:
            output, grads = evaluate(model, *args, **kwargs)
            return (output, grads), {"value": output[0] if has_aux else output}
        # Together, and before the first evaluation: generators that arguments share with the model stay shared.
        old_model, old_args, old_kwargs = nnx.clone((model, args, kwargs))
        nnx.update(old_model, point)
        connections = arrays_of(nnx.state(model, SparseConnections))
        nnx.update(old_model, at_point(connections, opt_state(optimizer)))
        output, grads = evaluate(model, *args, **kwargs)
        old_output, old_grads = evaluate(old_model, *old_args, **old_kwargs)
        old_grads = from_point(old_grads, connections, opt_state(optimizer))
        value, old_value = (output[0], old_output[0]) if has_aux else (output, old_output)
        return (output, grads), {"value": value, "old_value": old_value, "old_grads": old_grads}

    return values_and_grads


def refresh(
    loss_fn: Callable[..., Any], model: Any, optimizer: nnx.Optimizer, batches: Any, has_aux: bool = False
) -> None:
    r"""Moves the snapshot to the parameters of `model`, in place: the beginning of an epoch in Algorithm 1.

    .. math::
        c \leftarrow (1-\alpha)\, c + \alpha\, \hat c \ \text{(eq. 4, at the old snapshot)}, \qquad
        \tilde\theta \leftarrow \theta_t, \qquad
        \tilde g \leftarrow \frac1N \sum_i \nabla\ell(B_i|\tilde\theta)

    Only the state of the optimizer changes: each batch is evaluated on a copy of the model, whose BatchNorm statistics
    and random counters are then dropped. Random keys differ from batch to batch, as they do in training, so that the
    mean gradient is a mean over dropout masks too.

    Args:
        loss_fn: ``loss_fn(model, batch) -> loss``, or ``-> (loss, aux)`` with ``has_aux=True``. It must be the same
            function at each call, or the pass compiles anew.
        model: the model, in the mode in which it is trained.
        optimizer: a `flax.nnx.Optimizer` that holds `agent_optax.correct_gradients` with a snapshot memory.
        batches: a tree of arrays with a leading axis [N, ...] of N batches of equal size, scanned on the device; or
            an iterator of N batches of equal size (a host loop).
        has_aux: whether `loss_fn` returns ``(loss, aux)``.

    Raises:
        TypeError: if `optimizer` is no `flax.nnx.Optimizer`, or `batches` is neither arrays nor an iterator.
        ValueError: if the optimizer has no snapshot to refresh; if `batches` is empty, of unequal sizes, or of another
            number than the snapshot caches.

    Example:
        >>> import agent_optax, agent_optax.flax, jax.numpy as jnp
        >>> from flax import nnx
        >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        >>> optimizer = nnx.Optimizer(model, agent_optax.agent(0.1), wrt=nnx.Param)
        >>> def loss_fn(model, batch):
        ...     return jnp.mean((model(batch) - 1.0) ** 2)
        >>> agent_optax.flax.nnx.refresh(loss_fn, model, optimizer, jnp.ones((4, 8, 3)))
        >>> int(optimizer.opt_state[0].memory_state.num_refreshes[...])
        1

    References:
        Lei et al., Balance is Essence, CPAL 2024, Algorithm 1.
    """
    check_optimizer(optimizer)
    graphdef, params, rest = nnx.split(model, optimizer.wrt, ...)
    numbered = _numbered(batches)
    new_state = agent_optax.refresh(
        _pure_loss(loss_fn, graphdef), arrays_of(params), opt_state(optimizer), numbered, has_aux, args=(rest,)
    )
    nnx.update(optimizer.opt_state, nnx.state(new_state))


def mask_model(model: Any, optimizer: nnx.Optimizer) -> None:
    r"""Sets the inactive weights of `model` to exactly 0.0, in place: how a sparse run starts.

    .. math::
        p \leftarrow m \odot p

    Args:
        model: the model that the optimizer was built for.
        optimizer: a `flax.nnx.Optimizer` whose ``tx`` holds `agent_optax.sparsify`, at any depth.

    Raises:
        TypeError: if `optimizer` is no `flax.nnx.Optimizer`.
        ValueError: if it holds no `sparsify`.

    Example:
        >>> import agent_optax, agent_optax.flax, optax
        >>> from flax import nnx
        >>> model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        >>> tx = agent_optax.sparsify(optax.sgd(0.1), agent_optax.rigl(), sparsity=0.75)
        >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        >>> agent_optax.flax.nnx.mask_model(model, optimizer)
        >>> int((model.kernel[...] != 0).sum())
        4
    """
    check_optimizer(optimizer)
    nnx.update(model, agent_optax.mask_params(params_of(model, optimizer), opt_state(optimizer)))


def _numbered(batches: Any) -> Any:
    """Each batch with its number, from which its random keys are made."""
    if isinstance(batches, Iterator):
        return ((batch, jnp.asarray(i, jnp.int32)) for i, batch in enumerate(batches))
    leading = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batches)}
    if len(leading) != 1 or () in leading:
        return batches  # agent_optax.refresh says what is wrong with it
    return batches, jnp.arange(*leading.pop(), dtype=jnp.int32)


@functools.lru_cache(maxsize=64)  # the same function for the same model: the pass compiles once
def _pure_loss(loss_fn: Callable[..., Any], graphdef: Any) -> Callable[..., Any]:
    """The loss of parameters; what else the model holds is an argument, and what becomes of it is dropped."""

    def pure_loss(params: optax.Params, numbered_batch: tuple[Any, jax.Array], rest: Any) -> Any:
        batch, number = numbered_batch

        def own(variable: Any) -> Any:  # arrays, which merge makes variables of: those of the model stay as they are
            if not isinstance(variable, nnx.RngKey):
                return arrays_of(variable)
            return jnp.vectorize(jax.random.fold_in)(arrays_of(variable), number)  # several keys if they were split

        rest = jax.tree.map(own, rest, is_leaf=lambda node: isinstance(node, nnx.Variable))
        return loss_fn(nnx.merge(graphdef, params, rest), batch)

    return pure_loss
