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
import agent_optax.layers
from agent_optax.correction._evaluate import evaluation_point
from agent_optax.correction._layout import at_point, from_point
from agent_optax.flax._sparse_nnx import SparseConnections, SparseConv, SparseLinear
from agent_optax.flax._swap_nnx import sparse_layers, to_sparse_layers

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
        _check_optimizer(optimizer)
        evaluate = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, optimizer.wrt), has_aux=has_aux)
        point = evaluation_point(opt_state(optimizer), _params(model, optimizer))
        if point is None:
            output, grads = evaluate(model, *args, **kwargs)
            return (output, grads), {"value": output[0] if has_aux else output}
        # Together, and before the first evaluation: generators that arguments share with the model stay shared.
        old_model, old_args, old_kwargs = nnx.clone((model, args, kwargs))
        nnx.update(old_model, point)
        connections = _arrays(nnx.state(model, SparseConnections))
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
    _check_optimizer(optimizer)
    graphdef, params, rest = nnx.split(model, optimizer.wrt, ...)
    numbered = _numbered(batches)
    new_state = agent_optax.refresh(
        _pure_loss(loss_fn, graphdef), _arrays(params), opt_state(optimizer), numbered, has_aux, args=(rest,)
    )
    nnx.update(optimizer.opt_state, nnx.state(new_state))


def rewire(
    loss_fn: Callable[..., Any],
    model: Any,
    optimizer: nnx.Optimizer,
    batch: Any,
    *,
    topology: Any,
    step: Any,
    key: jax.Array,
    has_aux: bool = False,
    max_bytes: int = 2**30,
) -> tuple[jax.Array, jax.Array]:
    r"""A topology update of the sparse layers of a model, in place: drops weights that exist, grows as many others.

    With RigL, in each layer of N weights, :math:`n = \lceil \zeta N \rceil` of them:

    .. math::
        \text{drop the } n \text{ of least } |w|, \qquad
        \text{grow from zero the } n \text{ of largest } |g|, \quad g = \nabla_W\, \ell(B|\theta)

    Weights, connections and the state of the optimizer change; shapes do not. What is said at
    `agent_optax.layers.rewire` of memory, of corrections and of numbers that are not finite holds here. Call it outside
    `flax.nnx.jit`, after the step. With a correction by a snapshot, call `prepare_rewiring` once before training.

    Args:
        loss_fn: ``loss_fn(model, batch) -> loss``, or ``-> (loss, aux)`` with ``has_aux=True``. It must be the same
            function at each call, or this compiles anew. It runs on a copy of the model.
        model: the model, in the mode in which it is trained.
        optimizer: a `flax.nnx.Optimizer` of the model.
        batch: as `loss_fn` takes it.
        topology: `agent_optax.rigl`, `agent_optax.set_`, or an `agent_optax.drop_and_grow` without redistribution and
            momentum.
        step: the number of steps taken, counted from 1, on which a schedule of the drop fraction depends.
        key: a random key, another one at each call.
        has_aux: whether `loss_fn` returns ``(loss, aux)``.
        max_bytes: the most that dense gradients may take at a time. Default 1 GiB.

    Returns:
        How many weights have grown, int32, and whether gradients and weights were finite, bool; if not, nothing has
        changed.

    Raises:
        TypeError: if `optimizer` is no `flax.nnx.Optimizer`, or `topology` is none.
        ValueError: if the model has no sparse layer, or the topology cannot keep the numbers of weights.

    Example:
        >>> import agent_optax, agent_optax.flax, jax, jax.numpy as jnp, optax
        >>> from flax import nnx
        >>> model = agent_optax.flax.nnx.SparseLinear(64, 32, sparsity=0.875, rngs=nnx.Rngs(0))
        >>> optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
        >>> topology = agent_optax.rigl(update_every=100, stop=7500)
        >>> def loss_fn(model, batch):
        ...     return jnp.mean((model(batch) - batch[:, :32]) ** 2)
        >>> batch, step = jax.random.normal(jax.random.key(0), (16, 64)), 100
        >>> if topology.is_due(step):
        ...     num_grown, is_finite = agent_optax.flax.nnx.rewire(
        ...         loss_fn, model, optimizer, batch, topology=topology, step=step, key=jax.random.key(step)
        ...     )
        >>> int(num_grown) > 0
        True

    References:
        Evci et al., Rigging the Lottery: Making All Tickets Winners, ICML 2020.
    """
    _check_optimizer(optimizer)
    graphdef, params, connections, rest = nnx.split(model, optimizer.wrt, SparseConnections, ...)
    rewired = agent_optax.layers.rewire(
        _pure_rewire_loss(loss_fn, graphdef),
        _arrays(params),
        _arrays(connections),
        opt_state(optimizer),
        batch,
        tx=optimizer.tx,
        topology=topology,
        step=step,
        key=key,
        has_aux=has_aux,
        args=(rest,),
        max_bytes=max_bytes,
    )
    nnx.update(model, rewired.params, rewired.connections)
    nnx.update(optimizer.opt_state, nnx.state(rewired.opt_state))
    return rewired.num_grown, rewired.is_finite


def prepare_rewiring(model: Any, optimizer: nnx.Optimizer) -> None:
    """Gives the model, in place, the structure that `rewire` will give it: see `agent_optax.layers.prepare_rewiring`.

    So that a step does not compile once more after the first `rewire`, and checkpoints have one structure.

    Args:
        model: the model.
        optimizer: a `flax.nnx.Optimizer` of the model.

    Raises:
        TypeError: if `optimizer` is no `flax.nnx.Optimizer`.
        ValueError: if the model has no sparse layer.

    Example:
        >>> import agent_optax, agent_optax.flax
        >>> from flax import nnx
        >>> model = agent_optax.flax.nnx.SparseLinear(64, 32, sparsity=0.875, rngs=nnx.Rngs(0))
        >>> optimizer = nnx.Optimizer(model, agent_optax.agent(0.1), wrt=nnx.Param)
        >>> agent_optax.flax.nnx.prepare_rewiring(model, optimizer)
    """
    _check_optimizer(optimizer)
    connections = _arrays(nnx.state(model, SparseConnections))
    nnx.update(model, agent_optax.layers.prepare_rewiring(_params(model, optimizer), connections, opt_state(optimizer)))


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
    _check_optimizer(optimizer)
    nnx.update(model, agent_optax.mask_params(_params(model, optimizer), opt_state(optimizer)))


def opt_state(optimizer: nnx.Optimizer) -> optax.OptState:
    """The state of an optimizer as the functions of `agent_optax` take it: arrays, without NNX's variables around them.

    For `agent_optax.diagnostics`, `agent_optax.active_masks` or `agent_optax.snapshot_params`. Parameters to go with it
    are ``flax.nnx.as_pure(flax.nnx.state(model, optimizer.wrt))``.

    Args:
        optimizer: a `flax.nnx.Optimizer`.

    Returns:
        What ``optimizer.tx.init`` returned and ``optimizer.tx.update`` has changed since.

    Raises:
        TypeError: if `optimizer` is no `flax.nnx.Optimizer`.

    Example:
        >>> import agent_optax, agent_optax.flax, optax
        >>> from flax import nnx
        >>> model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        >>> tx = agent_optax.sparsify(optax.sgd(0.1), agent_optax.rigl(), sparsity=0.75)
        >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        >>> float(agent_optax.diagnostics(agent_optax.flax.nnx.opt_state(optimizer))["sparsity"])
        0.75
    """
    _check_optimizer(optimizer)
    return _arrays(optimizer.opt_state)


def _check_optimizer(optimizer: Any) -> None:
    if not isinstance(optimizer, nnx.Optimizer):
        raise TypeError(
            f"optimizer must be a flax.nnx.Optimizer, got {type(optimizer).__name__}: build it with "
            "nnx.Optimizer(model, tx, wrt=nnx.Param)."
        )


def _arrays(tree: Any) -> Any:
    """The tree with arrays in place of variables."""
    return nnx.as_pure(tree) if hasattr(nnx, "as_pure") else nnx.pure(tree)  # flax < 0.12.1


def _params(model: Any, optimizer: nnx.Optimizer) -> Any:
    return _arrays(nnx.state(model, optimizer.wrt))


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
                return _arrays(variable)
            return jnp.vectorize(jax.random.fold_in)(_arrays(variable), number)  # several keys if they were split

        rest = jax.tree.map(own, rest, is_leaf=lambda node: isinstance(node, nnx.Variable))
        return loss_fn(nnx.merge(graphdef, params, rest), batch)

    return pure_loss


@functools.lru_cache(maxsize=64)
def _pure_rewire_loss(loss_fn: Callable[..., Any], graphdef: Any) -> Callable[..., Any]:
    """The loss of parameters and connections."""

    def pure_loss(params: optax.Params, batch: Any, connections: Any, rest: Any) -> Any:
        rest = jax.tree.map(_arrays, rest, is_leaf=lambda node: isinstance(node, nnx.Variable))
        return loss_fn(nnx.merge(graphdef, params, connections, rest), batch)

    return pure_loss
