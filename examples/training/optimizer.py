"""The optimizer of a run: correction, weight decay and momentum in a chain, made sparse."""

from __future__ import annotations

import jax
import optax

import agent_optax
from training.config import Config, CorrectionConfig, TopologyConfig


def learning_rate_schedule(config: Config, total_steps: int) -> optax.Schedule:
    """Constant, and multiplied with the decay at each milestone."""
    steps = {round(share * total_steps): config.optimizer.decay for share in config.optimizer.milestones}
    return optax.piecewise_constant_schedule(config.optimizer.learning_rate, steps)


def build_optimizer(
    config: Config, steps_per_epoch: int, key: jax.Array
) -> optax.GradientTransformationExtraArgs | optax.GradientTransformation:
    """The optimizer that the configuration describes.

    Raises:
        ValueError: if the topology would never change in so few steps.
    """
    total_steps = config.epochs * steps_per_epoch
    settings = config.optimizer
    momentum = optax.sgd(
        learning_rate_schedule(config, total_steps), momentum=settings.momentum or None, nesterov=settings.nesterov
    )
    parts = [optax.add_decayed_weights(settings.weight_decay), momentum]
    if config.correction.memory != "none":
        parts.insert(0, correction(config.correction, config.epochs, steps_per_epoch))
    inner = optax.chain(*parts)
    if config.topology.name == "dense":
        return inner
    return agent_optax.sparsify(
        inner,
        topology(config.topology, total_steps),
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


def topology(config: TopologyConfig, total_steps: int):
    """When and how the set of active weights changes."""
    if config.name == "static":
        return agent_optax.static()
    is_itop = config.name in ("set_itop", "rigl_itop")
    update_every = config.update_every or (1500 if is_itop else 100)
    if update_every > total_steps:
        raise ValueError(
            f"{config.name} would never change in {total_steps} steps with --topology.update-every {update_every}: "
            "give a smaller interval, more epochs, or --topology.name static."
        )
    if is_itop:
        build = agent_optax.set_itop if config.name == "set_itop" else agent_optax.rigl_itop
        return build(total_steps, update_every)
    build = agent_optax.set_ if config.name == "set" else agent_optax.rigl
    return build(update_every, 0.3 if config.drop_fraction is None else config.drop_fraction)
