"""The optimizer of a run: correction, weight decay and momentum in a chain, made sparse."""

from __future__ import annotations

import jax
import optax

import agent_optax
from agent_optax.typing import Topology
from training.config import Config, CorrectionConfig, TopologyConfig


def learning_rate_schedule(config: Config, total_steps: int) -> optax.Schedule:
    """Constant between milestones."""
    settings = config.optimizer
    rates = [settings.learning_rate * decay for decay in (1.0, *settings.decays)]
    constants = [optax.constant_schedule(rate) for rate in rates]
    return optax.join_schedules(constants, [round(share * total_steps) for share in settings.milestones])


def build_optimizer(
    config: Config, steps_per_epoch: int, key: jax.Array
) -> optax.GradientTransformationExtraArgs | optax.GradientTransformation:
    """The optimizer that the configuration describes.

    Raises:
        ValueError: if the topology would never change in so few steps.
    """
    settings, rate = config.optimizer, learning_rate_schedule(config, config.epochs * steps_per_epoch)
    momentum = optax.trace(settings.momentum, settings.nesterov) if settings.momentum else optax.identity()
    decay = optax.add_decayed_weights(settings.weight_decay)
    parts = [*((momentum, decay) if settings.decoupled else (decay, momentum)), optax.scale_by_learning_rate(rate)]
    if config.correction.memory != "none":
        parts.insert(0, correction(config.correction, config.epochs, steps_per_epoch))
    inner = optax.chain(*parts)
    if config.topology.name == "dense" or config.topology.layers == "sparse":
        return inner
    return agent_optax.sparsify(
        inner,
        build_topology(config, steps_per_epoch),
        sparsity=config.topology.sparsity,
        distribution=getattr(agent_optax, config.topology.distribution),
        storage=config.topology.storage,
        grow_by=config.topology.grow_by,
        stagger=config.topology.stagger,
        key=key,
    )


def correction(config: CorrectionConfig, epochs: int, steps_per_epoch: int) -> optax.GradientTransformationExtraArgs:
    """The first part of the chain: the corrected gradient."""
    match config.memory:
        case "snapshot":
            memory = agent_optax.snapshot()
        case "cached_snapshot":
            memory = agent_optax.snapshot(cached_batches=steps_per_epoch)
        case "recursion":
            memory = agent_optax.recursion()
        case "table":
            memory = agent_optax.table(steps_per_epoch)
        case _:
            memory = agent_optax.history()
    match config.coefficient:
        case "loss_regression":
            coefficient = agent_optax.loss_regression(config.smoothing, initial=config.initial or 0.0)
        case "gradient_regression":
            coefficient = agent_optax.gradient_regression()
        case "constant":
            coefficient = agent_optax.constant(1.0 if config.initial is None else config.initial)
        case _:  # alpha-SVRG: it counts refreshes where there are any, and steps otherwise
            positions = epochs if config.has_refresh else epochs * steps_per_epoch
            start = 0.75 if config.initial is None else config.initial
            coefficient = agent_optax.scheduled(optax.linear_schedule(start, 0.0, max(positions - 1, 1)))
    scaling = config.scaling
    if scaling is None:
        scaling = 0.1 if config.coefficient == "loss_regression" else 1.0
    return agent_optax.correct_gradients(memory, coefficient, scaling=scaling)


def build_topology(config: Config, steps_per_epoch: int) -> Topology:
    """When and how the set of active weights changes.

    Raises:
        ValueError: if it would never change in so few steps.
    """
    rate = learning_rate_schedule(config, config.epochs * steps_per_epoch)
    return topology(config.topology, rate, config.epochs, steps_per_epoch)


def topology(config: TopologyConfig, learning_rate: optax.Schedule, epochs: int, steps_per_epoch: int) -> Topology:
    """The same, from its settings."""
    if config.name == "static":
        return agent_optax.static()
    total_steps = epochs * steps_per_epoch
    if config.name == "bayesian_rewiring":
        noise = optax.piecewise_constant_schedule(1e-6, {100 * steps_per_epoch: 10.0})  # the paper's
        return agent_optax.bayesian_rewiring(learning_rate, steps_per_epoch, noise)
    update_every = config.update_every or (1500 if config.name in ("set_itop", "rigl_itop") else 100)
    if update_every > total_steps:
        raise ValueError(
            f"{config.name} would never change in {total_steps} steps with --topology.update-every {update_every}: "
            "give a smaller interval, more epochs, or --topology.name static."
        )
    given = {} if config.drop_fraction is None else {"drop_fraction": config.drop_fraction}
    match config.name:
        case "set_itop":
            return agent_optax.set_itop(total_steps, update_every)
        case "rigl_itop":
            return agent_optax.rigl_itop(total_steps, update_every)
        case "gradual_pruning":  # the last quarter of training is at the final sparsity
            stop = max(round(0.75 * total_steps), update_every + 1)
            return agent_optax.gradual_pruning(stop, update_every, **given)
        case "snfs":
            return agent_optax.snfs(update_every, **given)
        case "set":
            return agent_optax.set_(update_every, **given)
    return agent_optax.rigl(update_every, **given)
