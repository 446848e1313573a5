"""Connections that have from the start the structure that topology updates give them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from agent_optax.correction._find import find_corrections
from agent_optax.correction._layout import counts_moves
from agent_optax.layers._point import Point
from agent_optax.layers._sparse_layer import is_connections, sparse_layers_of


def prepare_rewiring(params: optax.Params, connections: Any, opt_state: optax.OptState) -> Any:
    """Connections of the structure that `rewire` will return, so that it is the same from the first step on.

    Under a correction with an uncached `agent_optax.snapshot` the first `rewire` adds a `point` to the connections:
    functions that take them compile once more, and a checkpoint from before has another structure than one from after.
    Not so if the point is there from the start. Under any other optimizer connections stay as they are.

    Args:
        params: the parameters.
        connections: a tree that holds the connections of each sparse layer, as `rewire` takes it.
        opt_state: the state of the optimizer.

    Returns:
        Such a tree.

    Raises:
        ValueError: if no connections are found, or weights do not fit their connections.

    Example:
        >>> import agent_optax, jax
        >>> from agent_optax import layers
        >>> connections = {"hidden": layers.FanIn.random(jax.random.key(0), inputs=64, outputs=32, density=0.125)}
        >>> params = {"hidden": layers.init_values(jax.random.key(1), connections["hidden"])}
        >>> opt_state = agent_optax.agent(0.1).init(params)
        >>> connections = layers.prepare_rewiring(params, connections, opt_state)
        >>> connections["hidden"].point.parameter
        'hidden'
    """
    layers = iter(sparse_layers_of(params, connections))
    if not any(map(counts_moves, find_corrections(opt_state))):
        return connections

    def with_point(node: Any) -> Any:
        if not is_connections(node):
            return node
        name = next(layers).name
        if node.point is not None:
            return node
        stored = jax.tree.map(jnp.copy, node)
        return dataclasses.replace(
            node, point=Point(stored, jnp.ones(node.values_shape, bool), jnp.asarray(-1, jnp.int32), name)
        )

    return jax.tree.map(with_point, connections, is_leaf=is_connections)
