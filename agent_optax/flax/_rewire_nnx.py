"""Topology updates of the sparse layers of an NNX model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx

from agent_optax import layers
from agent_optax.flax._optimizer_nnx import arrays_of, check_optimizer, opt_state, params_of
from agent_optax.flax._sparse_nnx import SparseConnections
from agent_optax.sparsity._topology import Topology


def rewire(
    loss_fn: Callable[..., Any],
    model: Any,
    optimizer: nnx.Optimizer,
    batch: Any,
    *,
    topology: Topology,
    step: Any,
    key: jax.Array,
    has_aux: bool = False,
    candidates: float | None = None,
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
        candidates: how many weights may grow, drawn at random, over the number of weights that exist. Default None: all
            may grow, which takes the dense gradient.
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
    check_optimizer(optimizer)
    graphdef, params, connections, rest = nnx.split(model, optimizer.wrt, SparseConnections, ...)
    rewired = layers.rewire(
        _pure_rewire_loss(loss_fn, graphdef),
        arrays_of(params),
        arrays_of(connections),
        opt_state(optimizer),
        batch,
        tx=optimizer.tx,
        topology=topology,
        step=step,
        key=key,
        has_aux=has_aux,
        args=(rest,),
        candidates=candidates,
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
    check_optimizer(optimizer)
    connections = arrays_of(nnx.state(model, SparseConnections))
    nnx.update(model, layers.prepare_rewiring(params_of(model, optimizer), connections, opt_state(optimizer)))


@functools.lru_cache(maxsize=64)
def _pure_rewire_loss(loss_fn: Callable[..., Any], graphdef: Any) -> Callable[..., Any]:
    """The loss of parameters and connections."""

    def pure_loss(params: optax.Params, batch: Any, connections: Any, rest: Any) -> Any:
        rest = jax.tree.map(arrays_of, rest, is_leaf=lambda node: isinstance(node, nnx.Variable))
        return loss_fn(nnx.merge(graphdef, params, connections, rest), batch)

    return pure_loss
