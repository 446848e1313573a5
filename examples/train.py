"""Trains a network as the paper does: data set x network x topology x memory x coefficient x objective.

Begin with the name of a preset; every setting can be changed by a flag behind it:

    python examples/train.py digits
    python examples/train.py a-rigl-itop-vgg-c-cifar10-99 --data.data-dir ~/data --out runs/agent
    python examples/train.py a-rigl-itop-vgg-c-cifar10-99 --data.data-dir ~/data --out runs/agent --resume

Ctrl-C saves first; `--resume` goes on from there, bit for bit.
"""

from __future__ import annotations

import math
import sys
import time

import jax
import jax.numpy as jnp
import loaders
import numpy as np
import optax
import rich.console
import rich.progress
import tyro
from training.checkpoints import Checkpoints
from training.config import Config
from training.evaluation import evaluate
from training.interruption import Interruption
from training.journal import EpochRecord, Journal
from training.network import Network, as_pixels, build_network
from training.objective import build_objective, robust_accuracy
from training.optimizer import build_optimizer, build_topology, learning_rate_schedule
from training.plot import plot
from training.presets import presets
from training.steps import Order, Steps, TrainState

import agent_optax

INTERRUPTED = 130  # the exit status of a program that Ctrl-C ends


def main(config: Config) -> None:
    console = rich.console.Console()
    try:
        data = load_data(config)
        network, steps, state = build(config, data)
        checkpoints = Checkpoints(config)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    if config.resume:
        state = checkpoints.restore(state)
    if config.data.placement == "device":
        data = data._replace(train=on_device(data.train), test=on_device(data.test))
    console.print(summary(config, data, steps, state))
    with Interruption() as interruption, progress_bar(console) as progress:
        journal = Journal(config.out, int(state.epoch))
        task = progress.add_task("training", total=config.epochs, completed=int(state.epoch), news="compiling")
        while state.epoch < config.epochs and not interruption.is_requested:
            started = time.perf_counter()
            state = train_epoch(config, steps, state, data, interruption)
            if int(state.epoch_step) == steps.per_epoch:  # not if it was interrupted
                journal.write(measure(config, network, steps, state, data, time.perf_counter() - started))
                state = state.begin_epoch()
                progress.update(task, advance=1, news=news(journal.records[-1]))
            if state.epoch % config.checkpoint_every == 0 and not interruption.is_requested:
                checkpoints.save(state, steps_taken(steps, state))
        checkpoints.save(state, steps_taken(steps, state))
    checkpoints.close()
    journal.close()
    if state.epoch < config.epochs:
        where = f"epoch {int(state.epoch)}, step {int(state.epoch_step)}"
        console.print(f"Interrupted and saved after {where}: the same command with --resume goes on.")
        sys.exit(INTERRUPTED)
    finish(config, console, network, state, data, journal)


def steps_taken(steps: Steps, state: TrainState) -> int:
    return int(state.epoch) * steps.per_epoch + int(state.epoch_step)


def load_data(config: Config) -> loaders.DataSet:
    settings = config.data
    data = loaders.load(
        settings.name,
        settings.data_dir,
        from_hub=settings.from_hub,
        image_size=settings.image_size,
        num_train=settings.num_train,
    )
    if len(data.train.labels) < config.batch_size:
        raise ValueError(f"--batch-size {config.batch_size} is more than the {len(data.train.labels)} training images.")
    return data


def on_device(images: loaders.LabelledImages) -> loaders.LabelledImages:
    return loaders.LabelledImages(*jax.device_put(tuple(images)))


def build(config: Config, data: loaders.DataSet) -> tuple[Network, Steps, TrainState]:
    """The network, the compiled parts of its training, and the state before the first step."""
    root = jax.random.key(config.seed)
    params_key, topology_key, run_key = jax.random.split(root, 3)
    network, params, variables = build_network(config.model, config.topology, data, params_key)
    num_images = len(data.train.labels)
    per_epoch = num_images // config.batch_size
    optimizer = optax.with_extra_args_support(build_optimizer(config, per_epoch, topology_key))
    changes = config.topology.layers == "sparse" and config.topology.name != "static"
    topology = build_topology(config, per_epoch) if changes else None
    steps = Steps(config, build_objective(config.objective, network), optimizer, num_images, variables, topology)
    return network, steps, steps.start(params, run_key)


def train_epoch(
    config: Config, steps: Steps, state: TrainState, data: loaders.DataSet, interruption: Interruption
) -> TrainState:
    """The rest of the epoch, from where the state is; less if it is interrupted."""
    order, on_host = steps.order(state.key, state.epoch), config.data.placement == "host"
    if config.correction.has_refresh and state.epoch_step == 0:
        indices = steps.refresh_indices(order)
        if on_host:
            state = steps.refresh_from_host(state, data.train, np.asarray(indices))
        else:
            state = steps.refresh(state, *data.train, indices)
    per_call = config.steps_per_call or (50 if on_host else steps.per_epoch)
    if steps.topology is not None:  # a topology update of sparse layers comes between two calls, all of one length
        per_call = math.gcd(per_call, steps.per_epoch, steps.topology.interval)
    # Once refreshed, an epoch takes a step at least: what is saved is then known to be behind the refresh.
    while state.epoch_step < steps.per_epoch and not (interruption.is_requested and state.epoch_step):
        first = int(state.epoch_step)
        part = Order(*(rows[first : first + per_call] for rows in order))
        if on_host:
            rows = np.asarray(part.indices).reshape(-1)
            here = jnp.arange(len(rows)).reshape(part.indices.shape)
            state = steps.take(state, data.train.images[rows], data.train.labels[rows], Order(here, part.batch_index))
        else:
            state = steps.take(state, *data.train, part)
        last = part.indices[-1]
        state = steps.rewire(state, *(a[np.asarray(last) if on_host else last] for a in data.train))
    return state


def measure(
    config: Config, network: Network, steps: Steps, state: TrainState, data: loaders.DataSet, seconds: float
) -> EpochRecord:
    """The record of an epoch that has come to its end."""
    total_steps = int(state.epoch + 1) * steps.per_epoch
    is_sparsified = config.topology.name != "dense" and config.topology.layers == "dense"
    has_report = is_sparsified or config.correction.memory != "none"
    report = agent_optax.diagnostics(state.opt_state) if has_report else {}
    means = {name: float(total) / steps.per_epoch for name, total in state.sums.items()}
    test_loss, test_accuracy = evaluate(network, state.params, state.variables, data.test)
    return EpochRecord(
        epoch=int(state.epoch) + 1,
        seconds=seconds,
        learning_rate=float(learning_rate_schedule(config, config.epochs * steps.per_epoch)(total_steps - 1)),
        train_loss=means["loss"],
        train_accuracy=100 * means["num_right"] / config.batch_size,
        test_loss=test_loss,
        test_accuracy=test_accuracy,
        correlation=means.get("correlation"),
        correction_weight=means.get("correction_weight"),
        variance_ratio=float(report["variance_ratio"]) if report.get("variance_ratio_known") else None,
        **{name: float(report[name]) if name in report else None for name in ("sparsity", "exploration_rate")},
    )


def summary(config: Config, data: loaders.DataSet, steps: Steps, state: TrainState) -> str:
    size = sum(param.size for param in jax.tree.leaves(state.params))
    kind = "sparse layers" if config.topology.layers == "sparse" else f"{config.topology.storage} storage"
    sparse = (
        config.topology.name
        if config.topology.name == "dense"
        else (f"{config.topology.name} at {config.topology.sparsity:.0%}, {kind}")
    )
    memory = config.correction.memory
    corrected = "plain SGD" if memory == "none" else f"{memory} with {config.correction.coefficient}"
    return (
        f"{config.data.name}: {len(data.train.labels)} images for training, {len(data.test.labels)} for tests\n"
        f"{config.model.name}: {size:,} parameters, {sparse}\n"
        f"{config.objective.name} objective, {corrected}; {config.epochs} epochs of {steps.per_epoch} steps"
        + (f"; {int(state.epoch)} done" if state.epoch else "")
    )


def progress_bar(console: rich.console.Console) -> rich.progress.Progress:
    columns = rich.progress.Progress.get_default_columns()
    return rich.progress.Progress(*columns, rich.progress.TextColumn("{task.fields[news]}"), console=console)


def news(record: EpochRecord) -> str:
    parts = [f"loss {record.train_loss:.3f}", f"test {record.test_loss:.3f} {record.test_accuracy:.2f}%"]
    if record.sparsity is not None:
        parts.append(f"sparsity {record.sparsity:.4f} R_s {record.exploration_rate:.3f}")
    if record.correlation is not None:
        parts.append(f"c {record.correlation:.2f}")
    return "  ".join(parts)


def finish(
    config: Config,
    console: rich.console.Console,
    network: Network,
    state: TrainState,
    data: loaders.DataSet,
    journal: Journal,
) -> None:
    """The last record, robust accuracy where it is asked for, and the plot."""
    console.print(f"epoch {journal.records[-1].epoch}: {news(journal.records[-1])}")
    count = min(config.objective.robust_images, len(data.test.labels))
    if count:
        rows = np.arange(count)
        images, labels = as_pixels(jnp.asarray(data.test.images[rows])), data.test.labels[rows]
        accuracy = robust_accuracy(config.objective, network)(
            state.params, state.variables, images, labels, jax.random.fold_in(state.key, config.epochs)
        )
        console.print(
            f"robust accuracy under PGD-{config.objective.robust_steps}, {config.objective.robust_restarts} restarts, "
            f"on {count} test images: {100 * float(accuracy):.2f}%"
        )
        (config.out / "robust_accuracy.txt").write_text(f"{100 * float(accuracy)}\n")
    plot(journal.records, f"{config.model.name} on {config.data.name}", config.out / "curves.png")
    console.print(f"{config.out}: metrics.csv, curves.png, tensorboard, checkpoints")


def parse() -> Config:
    """The configuration that the command line describes."""
    return tyro.extras.overridable_config_cli(presets(), description=__doc__)


if __name__ == "__main__":
    main(parse())
