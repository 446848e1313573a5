"""What sparsity and correction cost an ordinary step, as ratios to plain Optax measured in the same process.

python benchmarks/overhead.py                       # 5M parameters
python benchmarks/overhead.py --num-params 1_000_000 25_000_000
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro
from interleaved import interleaved_seconds, median_ratio
from networks import batches, loss_fn, mlp_params
from rich.console import Console
from rich.table import Table

import agent_optax

NEVER = 10**9  # an interval that no step reaches: ordinary steps are what is timed


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure."""

    num_params: tuple[int, ...] = (5_000_000,)
    sparsities: tuple[float, ...] = (0.9, 0.95, 0.99)
    rounds: int = 60
    batch_size: int = 128
    whole_step: bool = True  # also time the whole train step
    output: Path | None = None  # where the JSON goes


def momentum() -> optax.GradientTransformation:
    """The optimizer of the paper's experiments."""
    return optax.sgd(0.1, momentum=0.9, nesterov=True)


def corrected(memory: Any, coefficient: Any, scaling: float) -> optax.GradientTransformationExtraArgs:
    """Momentum on the corrected gradient."""
    return optax.chain(agent_optax.correct_gradients(memory, coefficient, scaling), momentum())


def optimizers(sparsity: float) -> dict[str, tuple[str, optax.GradientTransformationExtraArgs]]:
    """Name -> (baseline, optimizer)."""
    never = agent_optax.rigl(update_every=NEVER)
    agent = functools.partial(corrected, agent_optax.snapshot(), agent_optax.loss_regression(), 0.1)
    regression = functools.partial(corrected, agent_optax.snapshot(), agent_optax.gradient_regression(), 1.0)
    history = functools.partial(corrected, agent_optax.history(), None, 0.1)
    cases: dict[str, tuple[str, Any]] = {"sgd": ("sgd", momentum()), "adamw": ("adamw", optax.adamw(1e-3))}
    for storage in ("dense", "compact"):
        sparse = functools.partial(agent_optax.sparsify, sparsity=sparsity, storage=storage)
        cases |= {
            f"static, sgd, {storage}": ("sgd", sparse(momentum(), agent_optax.static())),
            f"SET, sgd, {storage}": ("sgd", sparse(momentum(), agent_optax.set_(update_every=NEVER))),
            f"RigL, sgd, {storage}": ("sgd", sparse(momentum(), never)),
            f"RigL, adamw, {storage}": ("adamw", sparse(optax.adamw(1e-3), never)),
            f"RigL, AGENT, {storage}": ("sgd", sparse(agent(), never)),
            f"RigL, gradient regression, {storage}": ("sgd", sparse(regression(), never)),
            f"RigL, history, {storage}": ("sgd", sparse(history(), never)),
        }
    cases |= {"AGENT": ("sgd", agent()), "history": ("sgd", history())}
    return cases


def is_sparse(opt_state: Any) -> bool:
    """Whether parameters must be masked before the first step."""
    return isinstance(opt_state, agent_optax.SparsifyState)


def optimizer_step(tx: optax.GradientTransformationExtraArgs, params: Any) -> Callable[[], Any]:
    """A closure that takes one donated step with fixed gradients."""
    opt_state = tx.init(params)
    if is_sparse(opt_state):
        params = agent_optax.mask_params(params, opt_state)
    params = jax.tree.map(jnp.copy, params)
    grads = jax.tree.map(lambda p: 1e-3 * jax.random.normal(jax.random.key(2), p.shape), params)
    extras = {"value": jnp.ones(()), "old_value": jnp.ones(()), "old_grads": jax.tree.map(jnp.copy, grads)}

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, opt_state: Any, grads: Any, extras: Any) -> Any:
        updates, opt_state = tx.update(grads, opt_state, params, **extras)
        return optax.apply_updates(params, updates), opt_state

    held = [params, opt_state]

    def run() -> Any:
        held[:] = step(*held, grads, extras)
        return held

    return run


def train_step(tx: optax.GradientTransformationExtraArgs, params: Any, batch: Any) -> Callable[[], Any]:
    """A closure that takes one donated train step on a fixed batch."""
    opt_state = tx.init(params)
    if is_sparse(opt_state):
        params = agent_optax.mask_params(params, opt_state)
    params = jax.tree.map(jnp.copy, params)
    grads_fn = agent_optax.value_and_grads(loss_fn)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, opt_state: Any, batch: Any) -> Any:
        (_, grads), extras = grads_fn(params, opt_state, batch)
        updates, opt_state = tx.update(grads, opt_state, params, **extras)
        return optax.apply_updates(params, updates), opt_state

    held = [params, opt_state]

    def run() -> Any:
        held[:] = step(*held, batch)
        return held

    return run


def measure(config: Config, num_params: int, sparsity: float) -> list[dict[str, Any]]:
    """One row an optimizer."""
    params = mlp_params(num_params)
    cases = optimizers(sparsity)
    one_batch = jax.tree.map(lambda x: x[0], batches(1, config.batch_size))
    stages = {"optimizer": lambda tx: optimizer_step(tx, params)}
    if config.whole_step:
        stages["train"] = lambda tx: train_step(tx, params, one_batch)
    rows = {
        name: {"num_params": num_params, "sparsity": sparsity, "optimizer": name, "baseline": baseline}
        for name, (baseline, _) in cases.items()
    }
    for stage, make in stages.items():
        rounds = config.rounds if stage == "optimizer" else max(config.rounds // 3, 5)
        seconds = interleaved_seconds({name: make(tx) for name, (_, tx) in cases.items()}, rounds)
        for name, (baseline, _) in cases.items():
            rows[name][f"{stage}_ms"] = 1e3 * statistics.median(seconds[name])
            rows[name][f"{stage}_ratio"] = median_ratio(seconds, name, baseline)
    return list(rows.values())


def main(config: Config) -> None:
    """Prints a table for each size and sparsity; writes JSON."""
    console = Console(width=120)
    rows = []
    for num_params in config.num_params:
        for sparsity in config.sparsities:
            measured = measure(config, num_params, sparsity)
            rows += measured
            table = Table(
                title=f"{num_params / 1e6:g}M parameters, {sparsity:.0%} sparse, {jax.devices()[0].device_kind}"
            )
            columns = ["optimizer_ms", "optimizer_ratio"] + (["train_ms", "train_ratio"] if config.whole_step else [])
            for column in ["optimizer", "ratio to", *columns]:
                table.add_column(column, justify="left" if column in ("optimizer", "ratio to") else "right")
            for row in measured:
                table.add_row(row["optimizer"], row["baseline"], *(f"{row[c]:.2f}" for c in columns))
            console.print(table)
    if config.output:
        config.output.write_text(
            json.dumps({"device": str(jax.devices()[0]), "jax": jax.__version__, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main(tyro.cli(Config))
