"""What is inside a model and an optimizer of NNX, as arrays."""

from __future__ import annotations

from typing import Any

import optax
from flax import nnx


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
    check_optimizer(optimizer)
    return arrays_of(optimizer.opt_state)


def check_optimizer(optimizer: Any) -> None:
    """Raises TypeError unless it is one of NNX."""
    if not isinstance(optimizer, nnx.Optimizer):
        raise TypeError(
            f"optimizer must be a flax.nnx.Optimizer, got {type(optimizer).__name__}: build it with "
            "nnx.Optimizer(model, tx, wrt=nnx.Param)."
        )


def arrays_of(tree: Any) -> Any:
    """The tree with arrays in place of variables."""
    return nnx.as_pure(tree) if hasattr(nnx, "as_pure") else nnx.pure(tree)  # flax < 0.12.1


def params_of(model: Any, optimizer: nnx.Optimizer) -> Any:
    """The arrays of the parameters that an optimizer trains."""
    return arrays_of(nnx.state(model, optimizer.wrt))
