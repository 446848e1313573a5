"""What `sparsify(..., stagger=True)` does to the step that changes the topology, and to what is learned.

python benchmarks/stagger.py                    # times, then digits
python benchmarks/stagger.py --stages digits
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets
import tyro
from convergence.comparison import later_half, paired_difference
from interleaved import interleaved_seconds, write_report
from networks import logits, loss_fn, mlp_params
from overhead import momentum, optimizer_step, start
from rich.console import Console
from rich.table import Table

import agent_optax

LEARNING_RATE, BATCH_SIZE, NUM_TEST = 0.1, 32, 357
HIDDEN = (300, 100)


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure."""

    stages: tuple[Literal["times", "digits"], ...] = ("times", "digits")
    num_params: int = 5_000_000
    sparsity: float = 0.9  # of the network whose steps are timed
    update_every: int = 16
    storages: tuple[Literal["dense", "compact"], ...] = ("dense", "compact")
    intervals: int = 8  # of which times are taken, after one that is not
    digits_sparsity: float = 0.97
    seeds: int = 6
    epochs: int = 15
    output: Path | None = None  # where the JSON goes
    smoke: bool = False  # a tiny network, two intervals, two seeds, two epochs: to see that it runs

    def completed(self) -> Config:
        """With the sizes of a smoke test where one is asked for."""
        if not self.smoke:
            return self
        small = {"num_params": 5000, "update_every": 4, "storages": ("dense",), "intervals": 1, "seeds": 2, "epochs": 2}
        return dataclasses.replace(self, **small)


# ---------------------------------------------------------------------------------------------------------------------
# Times
# ---------------------------------------------------------------------------------------------------------------------


def times(config: Config) -> list[dict[str, Any]]:
    """The largest and the median step of an interval, medians over intervals; all optimizers step side by side."""
    params = mlp_params(config.num_params)
    rigl = agent_optax.rigl(update_every=config.update_every)
    txs = {"sgd": momentum()}
    for storage in config.storages:
        for stagger in (False, True):
            tx = agent_optax.sparsify(momentum(), rigl, sparsity=config.sparsity, storage=storage, stagger=stagger)
            txs[f"RigL, {storage}{', stagger' if stagger else ''}"] = tx
    steps = {name: optimizer_step(tx, start(tx, params)) for name, tx in txs.items()}
    seconds = interleaved_seconds(steps, config.intervals * config.update_every, warmup=config.update_every)
    rows = []
    for name in steps:
        intervals = 1e3 * np.asarray(seconds[name]).reshape(config.intervals, config.update_every)
        rows.append(
            {
                "table": "times",
                "optimizer": name,
                "median_ms": float(np.median(intervals)),
                "max_ms": statistics.median(intervals.max(axis=1)),
                "total_ms": statistics.median(intervals.sum(axis=1)),
            }
        )
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Digits
# ---------------------------------------------------------------------------------------------------------------------


class Digits(NamedTuple):
    """Images of 64 pixels, standardised, and labels."""

    train: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]


def load_digits() -> Digits:
    """The last images are the test set, which others wrote than the first."""
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    images = (images - images[:-NUM_TEST].mean()) / images[:-NUM_TEST].std()
    images, labels = jnp.asarray(images, jnp.float32), jnp.asarray(labels)
    return Digits((images[:-NUM_TEST], labels[:-NUM_TEST]), (images[-NUM_TEST:], labels[-NUM_TEST:]))


def digits_params(key: jax.Array) -> dict[str, dict[str, jax.Array]]:
    """An MLP 64-300-100-10, named as `loss_fn` reads it."""
    he_normal, params = jax.nn.initializers.he_normal(), {}
    sizes = (64, *HIDDEN, 10)
    for i, layer_key in enumerate(jax.random.split(key, len(sizes) - 1)):
        params[f"dense_{i}"] = {"kernel": he_normal(layer_key, sizes[i : i + 2]), "bias": jnp.zeros(sizes[i + 1])}
    return params


def train(seed: jax.Array, stagger: bool, config: Config, data: Digits) -> tuple[jax.Array, jax.Array]:
    """Test accuracy after each epoch, and R_s, the share of weights that were ever active, in percent.

    One interval is an epoch; without `stagger` all layers change in the middle of it.
    """
    num_steps = len(data.train[1]) // BATCH_SIZE
    fraction = optax.cosine_decay_schedule(0.5, config.epochs * num_steps, alpha=0.01)
    topology = agent_optax.rigl(update_every=num_steps, start=num_steps // 2, drop_fraction=fraction)
    params_key, key = jax.random.split(jax.random.key(seed))
    tx = agent_optax.sparsify(
        optax.sgd(LEARNING_RATE, momentum=0.9, nesterov=True),
        topology,
        sparsity=config.digits_sparsity,
        stagger=stagger,
        key=key,
    )
    params = digits_params(params_key)
    opt_state = tx.init(params)
    masks = agent_optax.active_masks(opt_state, params)
    params = jax.tree.map(  # a unit's input has the variance that it has when dense
        lambda m, p: p if m is None else p / jnp.sqrt(jnp.mean(m)), masks, params, is_leaf=lambda m: m is None
    )
    params = agent_optax.mask_params(params, opt_state)

    def step(carry: Any, batch: Any) -> Any:
        params, opt_state = carry
        updates, opt_state = tx.update(jax.grad(loss_fn)(params, batch), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    def epoch(carry: Any, key: jax.Array) -> Any:
        order = jax.random.permutation(key, len(data.train[1]))[: num_steps * BATCH_SIZE].reshape(num_steps, -1)
        carry, _ = jax.lax.scan(step, carry, jax.tree.map(lambda x: x[order], data.train))
        images, labels = data.test
        return carry, 100 * jnp.mean(jnp.argmax(logits(carry[0], images), -1) == labels)

    keys = jax.random.split(jax.random.fold_in(key, 1), config.epochs)
    (_, opt_state), accuracy = jax.lax.scan(epoch, (params, opt_state), keys)
    return accuracy, 100 * agent_optax.diagnostics(opt_state)["exploration_rate"]


def digits(config: Config) -> list[dict[str, Any]]:
    """Accuracy over the second half of the epochs and R_s, with and without, and their paired difference."""
    data = load_digits()
    values: dict[bool, dict[str, np.ndarray]] = {}
    for stagger in (False, True):
        run = functools.partial(train, stagger=stagger, config=config, data=data)
        accuracy, explored = jax.jit(jax.vmap(run))(jnp.arange(config.seeds))
        values[stagger] = {"accuracy": later_half(np.asarray(accuracy)), "explored": np.asarray(explored)}
    rows = []
    for quantity in ("accuracy", "explored"):
        at_once, staggered = (values[stagger][quantity] for stagger in (False, True))
        difference = paired_difference(staggered, at_once)
        rows.append(
            {
                "table": "digits",
                "quantity": quantity,
                "at_once": float(at_once.mean()),
                "stagger": float(staggered.mean()),
                "difference": difference.mean,
                "half_interval": difference.margin,
                "seeds": config.seeds,
            }
        )
    return rows


def main(config: Config) -> None:
    """Prints two tables; writes JSON."""
    config = config.completed()
    console, rows = Console(width=120), []
    if "times" in config.stages:
        measured = times(config)
        title = (
            f"{config.num_params / 1e6:g}M parameters, {config.sparsity:.0%} sparse, every {config.update_every} steps"
        )
        table = Table(title=title)
        for column in ("optimizer", "median step, ms", "largest step, ms", "largest / median", "interval, ms"):
            table.add_column(column, justify="left" if column == "optimizer" else "right")
        for row in measured:
            numbers = row["median_ms"], row["max_ms"], row["max_ms"] / row["median_ms"], row["total_ms"]
            table.add_row(row["optimizer"], *(f"{x:.1f}" for x in numbers))
        console.print(table)
        rows += measured
    if "digits" in config.stages:
        measured = digits(config)
        table = Table(title=f"digits, MLP 64-300-100-10, {config.digits_sparsity:.0%} sparse, {config.seeds} seeds")
        for column in ("quantity, %", "at once", "stagger", "difference"):
            table.add_column(column, justify="left" if column == "quantity, %" else "right")
        for row in measured:
            difference = f"{row['difference']:+.2f} ± {row['half_interval']:.2f}"
            table.add_row(row["quantity"], f"{row['at_once']:.2f}", f"{row['stagger']:.2f}", difference)
        console.print(table)
        rows += measured
    write_report(config.output, config, rows)


if __name__ == "__main__":
    main(tyro.cli(Config))
