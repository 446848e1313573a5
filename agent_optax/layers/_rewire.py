"""Topology updates of sparse layers."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from agent_optax._validation import check_positive_int, is_concrete_number
from agent_optax.correction._find import find_corrections, map_corrections
from agent_optax.correction._layout import counts_moves, num_refreshes
from agent_optax.layers._candidates import grow_among_candidates
from agent_optax.layers._connections import Connections
from agent_optax.layers._dense_growth import grow_among_all
from agent_optax.layers._places import Places
from agent_optax.layers._point import Point
from agent_optax.layers._sparse_layer import is_connections, sparse_layers_of
from agent_optax.sparsity._topology import Topology
from agent_optax.sparsity.inner._state_arrays import leaf_of_each_state


class Rewired(NamedTuple):
    """What `rewire` returns."""

    params: Any  # weights that have grown are zero
    connections: Any  # of the same shapes as before
    opt_state: Any  # weights that have grown begin anew
    num_grown: jax.Array  # int32 []: weights that exist now and did not before, as many as were dropped
    is_finite: jax.Array  # bool []: whether gradients and weights were finite; if not, nothing has changed


def rewire(
    loss_fn: Callable[..., Any],
    params: optax.Params,
    connections: Any,
    opt_state: optax.OptState,
    batch: Any,
    *,
    tx: optax.GradientTransformation,
    topology: Topology,
    step: Any,
    key: jax.Array,
    has_aux: bool = False,
    args: tuple[Any, ...] = (),
    candidates: float | None = None,
    max_bytes: int = 2**30,
) -> Rewired:
    r"""A topology update of sparse layers: drops weights that exist, grows as many that do not.

    With RigL, in each layer of N weights, :math:`n = \lceil \zeta N \rceil` of them:

    .. math::
        \text{drop the } n \text{ of least } |w|, \qquad
        \text{grow from zero the } n \text{ of largest } |g|, \quad g = \nabla_W\, \ell(B|\theta)

    the numbers that `agent_optax.sparsify` gives with dense kernels, ``pattern=fan_in(group=G)`` and the same gradient.
    Call it after a step, when ``topology.is_due(step)``; the gradient is that at the parameters after the step. Shapes
    do not change, so nothing else compiles again (but see `prepare_rewiring`). State of the optimizer moves along with
    the weights that stay, and is the initial one where a weight has grown.

    The dense gradient of a layer exists only during this call, for as many outputs at a time as `max_bytes` allows: a
    layer that is larger is rewired in parts of equal numbers of outputs, each as if it were a layer of its own, at the
    cost of a forward and a backward pass for each. Selection takes a few times the memory of a part in addition.

    With `candidates` the dense gradient never exists: weights grow among so many drawn at random, whose gradients alone
    are computed (guided stochastic exploration). That costs a few steps of the sparse network, however large the dense
    one is, and layers are not divided.

    Corrections go on. What `table`, `history` and a snapshot with ``cached_batches`` have stored moves along with the
    weights; an uncached `snapshot` keeps the connections that it was stored with, in ``connections.point``, until the
    next refresh: hand the connections to `agent_optax.value_and_grads` and `agent_optax.refresh` as an argument of the
    loss, so that they see them; a loss that closes over connections would be evaluated with the wrong ones. `recursion`
    begins anew. Weights that have grown are not corrected before the memory has seen them, so corrections stay
    mean-zero. The first call adds the point; `prepare_rewiring` adds it from the start.

    Args:
        loss_fn: ``loss_fn(params, batch, connections, *args) -> loss``, or ``-> (loss, aux)`` with ``has_aux=True``. It
            must be the same function at each call, or this compiles anew.
        params: the parameters.
        connections: a tree that holds the connections of each sparse layer. The weights that go with the connections at
            ``"hidden"`` or ``"hidden/connections"`` are the parameter ``"hidden"`` or ``"hidden/values"``.
        opt_state: the state of the optimizer.
        batch: as `loss_fn` takes it: a larger one than in training makes the gradient less noisy.
        tx: the optimizer.
        topology: `agent_optax.rigl`, `agent_optax.set_`, or an `agent_optax.drop_and_grow` without redistribution and
            momentum.
        step: the number of steps taken, counted from 1, on which a schedule of the drop fraction depends.
        key: a random key, another one at each call.
        has_aux: whether `loss_fn` returns ``(loss, aux)``.
        args: what `loss_fn` takes after the connections. Default: nothing.
        candidates: how many weights may grow, drawn at random, over the number of weights that exist: 1.0 draws as many
            as there are. Default None: all may grow, which takes the dense gradient.
        max_bytes: the most that dense gradients may take at a time. Default 1 GiB. Without effect with `candidates`.

    Returns:
        ``(params, connections, opt_state, num_grown, is_finite)``. If a gradient or a weight is not finite, nothing
        changes, and `is_finite` is False.

    Raises:
        ValueError: if no connections are found, weights do not fit their connections, or `topology` cannot keep the
            numbers of weights; if `candidates` is not positive; if a memory has a point whose refreshes it does not
            count.
        TypeError: if `topology` is none.

    Example:
        >>> import agent_optax, jax, jax.numpy as jnp, optax
        >>> from agent_optax import layers
        >>> connections = {"hidden": layers.FanIn.random(jax.random.key(0), inputs=64, outputs=32, density=0.125)}
        >>> params = {"hidden": layers.init_values(jax.random.key(1), connections["hidden"])}
        >>> def loss_fn(params, batch, connections):
        ...     return jnp.mean(
        ...         (layers.sparse_dot(batch, params["hidden"], connections["hidden"]) - batch[:, :32]) ** 2
        ...     )
        >>> tx, topology = optax.adam(1e-3), agent_optax.rigl(update_every=100)
        >>> opt_state, batch = tx.init(params), jax.random.normal(jax.random.key(2), (16, 64))
        >>> params, connections, opt_state, num_grown, _ = layers.rewire(
        ...     loss_fn,
        ...     params,
        ...     connections,
        ...     opt_state,
        ...     batch,
        ...     tx=tx,
        ...     topology=topology,
        ...     step=100,
        ...     key=jax.random.key(3),
        ... )
        >>> params["hidden"].shape, int(num_grown) > 0
        ((32, 8), True)

    References:
        Evci et al., Rigging the Lottery: Making All Tickets Winners, ICML 2020; Heddes et al., Always-Sparse Training
        by Growing Connections with Guided Stochastic Exploration, 2024, for `candidates`.
    """
    _check_topology(topology)
    _check_memories(opt_state)
    check_positive_int("max_bytes", max_bytes, "it is the most that dense gradients may take at a time")
    if candidates is not None and not (is_concrete_number(candidates) and 0 < candidates < math.inf):
        raise ValueError(
            f"candidates must be a positive number such as 1.0, got {candidates!r}: how many weights may grow, over "
            "the number of weights that exist; None lets all grow."
        )
    layers = sparse_layers_of(params, connections)
    step, keys = jnp.asarray(step, jnp.int32), jax.random.split(key, len(layers))
    problem = (loss_fn, has_aux, (params, connections, batch, args), layers, topology, step, keys)
    if candidates is None:
        new, is_finite = grow_among_all(*problem, max_bytes)
    else:
        new, is_finite = grow_among_candidates(*problem, candidates)
    leaves = tuple(layer.leaf for layer in layers), tuple(layer.name for layer in layers)
    return _changed(tx, leaves, params, connections, opt_state, new, is_finite)


def _check_topology(topology: Any) -> None:
    if not isinstance(topology, Topology):
        raise TypeError(f"topology must be one such as agent_optax.rigl(), got {topology!r}.")
    keeps = topology.is_layerwise and topology.keeps_counts and topology.supports_groups and not topology.is_static
    if not keeps or jax.tree.leaves(topology.init(jnp.ones(()), jnp.ones((), bool), [])):
        raise ValueError(
            f"rewire needs a topology that replaces weights within a layer and remembers nothing, and {topology} is "
            "none: use agent_optax.rigl(), agent_optax.set_(), or agent_optax.drop_and_grow() without redistribute= "
            "and momentum=."
        )


def _check_memories(opt_state: optax.OptState) -> None:
    for state in find_corrections(opt_state):
        memory_state = state.memory_state
        if memory_state.evaluation_point() is None or memory_state.moves_every_step() or counts_moves(state):
            continue
        raise ValueError(
            f"{type(memory_state).__name__} stores a point and does not count how often it moves, without which rewire "
            "cannot know with which connections it was stored: add a field num_refreshes, int32 [], to the state."
        )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _changed(
    tx: optax.GradientTransformation,
    leaves: tuple[tuple[int, ...], tuple[str, ...]],
    params: optax.Params,
    connections: Any,
    opt_state: optax.OptState,
    new_connections: Sequence[Connections],
    is_finite: jax.Array,
) -> Rewired:
    """Everything at the new connections; as it was unless `is_finite`."""
    nodes, treedef = jax.tree.flatten(connections, is_leaf=is_connections)
    version = num_refreshes(opt_state)
    has_point = any(map(counts_moves, find_corrections(opt_state)))
    weights, params_treedef = jax.tree.flatten(params)
    places: dict[int, Places] = {}
    num_grown = jnp.zeros((), jnp.int32)
    numbers = [i for i, node in enumerate(nodes) if is_connections(node)]
    for i, leaf, name, proposed in zip(numbers, *leaves, new_connections, strict=True):
        old = nodes[i]
        new = jax.tree.map(functools.partial(jnp.where, is_finite), proposed, old.without_point())
        places[leaf] = new.places_in(old)
        weights[leaf] = places[leaf].take(weights[leaf], jnp.zeros_like(weights[leaf]))
        num_grown += jnp.sum(~places[leaf].is_there, dtype=jnp.int32)
        if has_point:
            new = dataclasses.replace(new, point=_point(old, new, version, name))
        nodes[i] = new
    params = params_treedef.unflatten(weights)

    fresh = jax.tree.leaves(tx.init(params))
    arrays, state_treedef = jax.tree.flatten(opt_state)
    owners = leaf_of_each_state(tx, opt_state, params, exempt="point_fields")
    moved = [
        places[owner].take(array, initial) if owner in places else array
        for owner, array, initial in zip(owners, arrays, fresh, strict=True)
    ]

    def restart(state: Any, view: Any) -> Any:
        return state._replace(memory_state=state.memory_state.restarted(view.gather(params)))

    new_state = map_corrections(restart, state_treedef.unflatten(moved))
    opt_state = jax.tree.map(
        lambda new, old: new if new is old else jnp.where(is_finite, new, old), new_state, opt_state
    )
    return Rewired(params, treedef.unflatten(nodes), opt_state, num_grown, is_finite)


def _point(old: Connections, new: Connections, version: jax.Array, name: str) -> Point:
    """What stays of the connections that the point was stored with: those before this change, if it is the first."""
    if old.point is None:
        return Point(old, old.places_in(new).is_there, version, name)
    is_kept = old.point.is_kept | (old.point.num_refreshes != version)
    stored = old.at_point(version)
    return Point(stored, is_kept & stored.places_in(new).is_there, version, name)
