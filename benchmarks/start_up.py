"""How long a small transformer in NNX takes to start: the optimizer, the first steps, the first topology update.

python benchmarks/start_up.py                   # each case in a process of its own, three times in turn

Almost all of it is tracing and compiling, once a run; JAX's compilation cache is off.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import optax
import tyro
from flax import nnx
from interleaved import write_report
from rich.console import Console
from rich.table import Table

import agent_optax
import agent_optax.flax

UPDATE_EVERY, SPARSITY, BATCH_SIZE, NUM_BATCHES = 4, 0.9, 8, 3
COMPILED = "/jax/core/compile/backend_compile_duration"
CASES = ("adamw", "RigL, dense", "RigL, compact", "corrected RigL, dense", "corrected RigL, compact")
STAGES = {
    "init": "init",
    "jitted_init": "init under jit",
    "first_refresh": "first refresh",
    "first_step": "first step",
    "second_step": "second step",
    "topology_update": "first topology update",
    "second_refresh": "second refresh",
    "step_after": "step after it",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure."""

    cases: tuple[str, ...] = CASES
    rounds: int = 3
    case: str | None = None  # this one, here and now: what the processes that are started do
    output: Path | None = None  # where the JSON goes
    smoke: bool = False  # a tiny network, one round of two cases: to see that it runs

    def completed(self) -> Config:
        """With the sizes of a smoke test where one is asked for."""
        return dataclasses.replace(self, cases=CASES[:2], rounds=1) if self.smoke else self


class Block(nnx.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.norm_1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.norm_2 = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm_1(x))
        return x + self.down(nnx.gelu(self.up(self.norm_2(x))))


class Transformer(nnx.Module):
    """Two blocks: 13 kernels, 0.47 million parameters at width 128."""

    def __init__(self, width: int, rngs: nnx.Rngs, vocabulary: int = 256, context: int = 64):
        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (context, width)))
        self.blocks = nnx.List([Block(width, rngs) for _ in range(2)])
        self.head = nnx.Linear(width, vocabulary, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens) + self.positions[...]
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def loss_fn(model: Transformer, batch: Any) -> jax.Array:
    """Cross-entropy of the next token."""
    return optax.softmax_cross_entropy_with_integer_labels(model(batch), jnp.roll(batch, -1, axis=-1)).mean()


def optimizer_of(case: str) -> Any:
    """The optimizer of a case by its name."""
    inner = optax.adamw(1e-3)
    if case == "adamw":
        return inner
    if case.startswith("corrected"):
        coefficient = agent_optax.gradient_regression()
        inner = optax.chain(agent_optax.correct_gradients(agent_optax.snapshot(), coefficient, scaling=1.0), inner)
    storage = "compact" if case.endswith("compact") else "dense"
    return agent_optax.sparsify(inner, agent_optax.rigl(UPDATE_EVERY), sparsity=SPARSITY, storage=storage)


def measured(case: str, width: int) -> dict[str, Any]:
    """Seconds of each stage, programs compiled in it, and how often the step was traced in all."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(seconds) if event == COMPILED else None
    )
    row: dict[str, Any] = {"table": "start_up", "case": case}

    def timed(stage: str, run: Callable[[], Any]) -> Any:
        began, before = time.perf_counter(), len(compiled)
        output = run()
        jax.block_until_ready(nnx.state(optimizer if output is None else output))
        row[stage], row[f"{stage}_programs"] = time.perf_counter() - began, len(compiled) - before
        return output

    model, tx = Transformer(width, nnx.Rngs(0)), optimizer_of(case)
    row["num_params"] = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    optimizer = timed("init", lambda: nnx.Optimizer(model, tx, wrt=nnx.Param))
    again = optimizer_of(case)  # which has not looked at its inner optimizer yet
    timed("jitted_init", lambda: nnx.jit(lambda model: nnx.Optimizer(model, again, wrt=nnx.Param))(model))
    grads_fn = agent_optax.flax.nnx.value_and_grads(loss_fn)
    num_traced = 0

    @nnx.jit
    def step(model: Transformer, optimizer: nnx.Optimizer, batch: jax.Array) -> jax.Array:
        nonlocal num_traced
        num_traced += 1
        (value, grads), extras = grads_fn(model, optimizer, batch)
        if case == "adamw":
            optimizer.update(model, grads)
        else:
            optimizer.update(model, grads, **extras)
        return value

    def one_step() -> None:
        step(model, optimizer, batches[0])

    def one_refresh() -> None:
        agent_optax.flax.nnx.refresh(loss_fn, model, optimizer, batches)

    batches = jax.random.randint(jax.random.key(0), (NUM_BATCHES, BATCH_SIZE, 64), 0, 256)
    jax.block_until_ready(batches[0])
    if case != "adamw":
        agent_optax.flax.nnx.mask_model(model, optimizer)
    if case.startswith("corrected"):
        timed("first_refresh", one_refresh)
    timed("first_step", one_step)
    timed("second_step", one_step)
    for _ in range(UPDATE_EVERY - 3):
        one_step()
    timed("topology_update", one_step)
    if case.startswith("corrected"):
        timed("second_refresh", one_refresh)
    timed("step_after", one_step)
    if case != "adamw":
        report = agent_optax.diagnostics(agent_optax.flax.nnx.opt_state(optimizer))
        row["num_topology_updates"] = int(report["num_topology_updates"])
    return {**row, "step_traced": num_traced}


def in_processes(config: Config) -> list[dict[str, Any]]:
    """A row a case and round: all cases in each round, in an order of its own."""
    env = {name: text for name, text in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    order, rows = random.Random(0), []
    for turn in range(config.rounds):
        for case in order.sample(config.cases, len(config.cases)):
            command = [sys.executable, __file__, "--case", case, *(["--smoke"] if config.smoke else [])]
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{case}: {done.stderr[-2000:]}")
            rows.append({**json.loads(done.stdout.splitlines()[-1]), "round": turn, "load": os.getloadavg()[0]})
    return rows


def main(config: Config) -> None:
    """Prints a table: medians over rounds, and their range; writes JSON."""
    config = config.completed()
    if config.case is not None:
        print(json.dumps(measured(config.case, 16 if config.smoke else 128)))
        return
    rows = in_processes(config)
    table = Table(title=f"seconds, {rows[0]['num_params'] / 1e6:.2g}M parameters; programs compiled")
    for column in ("", *config.cases):
        table.add_column(column, justify="right" if column else "left")
    for stage, name in STAGES.items():
        cells = []
        for case in config.cases:
            of_case = [row for row in rows if row["case"] == case and stage in row]
            seconds = [row[stage] for row in of_case]
            cells.append(
                f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f}); "
                f"{of_case[0][f'{stage}_programs']}"
                if seconds
                else "-"
            )
        table.add_row(name, *cells)
    traced = [next(row["step_traced"] for row in rows if row["case"] == case) for case in config.cases]
    table.add_row("step traced, in all", *map(str, traced))
    Console(width=180).print(table)
    write_report(config.output, config, rows)


if __name__ == "__main__":
    main(tyro.cli(Config))
