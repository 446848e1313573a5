"""What sparsity and correction cost a step, as ratios to plain Optax measured in the same process.

Both the optimizer step alone, with gradients given, and the whole train step, forward and backward passes included;
and what it costs to trace and compile `init` and the optimizer step of networks of few and of many equal kernels.

    python benchmarks/overhead.py                                    # 5M parameters, 90, 95 and 99% sparse
    python benchmarks/overhead.py --num-params 1_000_000 25_000_000 --sparsities 0.99
    python benchmarks/overhead.py --select history table             # only optimizers whose name holds one of these
    python benchmarks/overhead.py --stages compile --select "RigL, sgd"
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import tyro
from interleaved import interleaved_seconds, median_ratio, write_report
from networks import batches, loss_fn, mlp_params
from rich.console import Console
from rich.table import Table

import agent_optax

NEVER = 10**9  # an interval that no step reaches: ordinary steps are what is timed
NUM_BATCHES = 4  # rows of the memories that keep a gradient of each batch


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure."""

    num_params: tuple[int, ...] = (5_000_000,)
    sparsities: tuple[float, ...] = (0.9, 0.95, 0.99)
    stages: tuple[Literal["optimizer", "train", "compile"], ...] = ("optimizer", "train")
    depths: tuple[int, ...] = (1, 16, 100)  # numbers of kernels of 64 x 64 that are compiled
    rounds: int = 30  # of the optimizer step; a third as many of the train step
    batch_size: int = 128
    select: tuple[str, ...] = ()  # only optimizers whose name holds one of these, and their baselines
    output: Path | None = None  # where the JSON goes
    smoke: bool = False  # one tiny network, two rounds, few optimizers: to see that it runs

    def completed(self) -> Config:
        """With the sizes of a smoke test where one is asked for."""
        if not self.smoke:
            return self
        select = self.select or ("RigL, table, compact", "RigL, AGENT, dense", "history, no sparsity")
        sizes = {"num_params": (5000,), "sparsities": (0.9,), "rounds": 2, "batch_size": 4, "depths": (1, 2)}
        return dataclasses.replace(self, **sizes, select=select)


def momentum() -> optax.GradientTransformation:
    """The optimizer of the paper's experiments."""
    return optax.sgd(0.1, momentum=0.9, nesterov=True)


def corrected(memory: Any, coefficient: Any, scaling: float) -> optax.GradientTransformationExtraArgs:
    """Momentum on the corrected gradient."""
    return optax.chain(agent_optax.correct_gradients(memory, coefficient, scaling), momentum())


def corrections() -> dict[str, optax.GradientTransformationExtraArgs]:
    """Momentum SGD with each memory."""
    regression = agent_optax.gradient_regression
    return {
        "AGENT": corrected(agent_optax.snapshot(), agent_optax.loss_regression(), 0.1),
        "gradient regression": corrected(agent_optax.snapshot(), regression(), 1.0),
        "cached snapshot": corrected(agent_optax.snapshot(NUM_BATCHES), regression(), 1.0),
        "recursion": corrected(agent_optax.recursion(), agent_optax.constant(0.9), 1.0),
        "table": corrected(agent_optax.table(NUM_BATCHES), regression(), 1.0),
        "history": corrected(agent_optax.history(), regression(), 1.0),
        "history, constant": corrected(agent_optax.history(), agent_optax.constant(0.1), 1.0),
    }


def optimizers(sparsity: float) -> dict[str, tuple[str, optax.GradientTransformationExtraArgs]]:
    """Name -> (baseline, optimizer)."""
    rigl = agent_optax.rigl(update_every=NEVER)
    cases: dict[str, tuple[str, Any]] = {"sgd": ("sgd", momentum()), "adamw": ("adamw", optax.adamw(1e-3))}
    for storage in ("dense", "compact"):
        updates = {"updates": "sparse"} if storage == "compact" else {}
        sparse = functools.partial(agent_optax.sparsify, sparsity=sparsity, storage=storage, **updates)
        cases |= {
            f"static, sgd, {storage}": ("sgd", sparse(momentum(), agent_optax.static())),
            f"SET, sgd, {storage}": ("sgd", sparse(momentum(), agent_optax.set_(update_every=NEVER))),
            f"RigL, sgd, {storage}": ("sgd", sparse(momentum(), rigl)),
            f"RigL, adamw, {storage}": ("adamw", sparse(optax.adamw(1e-3), rigl)),
        }
        cases |= {f"RigL, {name}, {storage}": ("sgd", sparse(tx, rigl)) for name, tx in corrections().items()}
    return cases | {f"{name}, no sparsity": ("sgd", tx) for name, tx in corrections().items()}


def selected(config: Any, sparsity: float) -> dict[str, tuple[str, optax.GradientTransformationExtraArgs]]:
    """Those asked for, and what they are compared with."""
    cases = optimizers(sparsity)
    if not config.select:
        return cases
    names = [name for name in cases if any(part in name for part in config.select)]
    if not names:
        raise ValueError(f"--select {' '.join(config.select)} fits none of these: {'; '.join(cases)}")
    needed = {cases[name][0] for name in names} | set(names)
    return {name: case for name, case in cases.items() if name in needed}


def start(tx: optax.GradientTransformationExtraArgs, params: Any) -> tuple[Any, Any]:
    """Parameters of its own, exactly sparse where `tx` is, and the state."""

    @jax.jit
    def init(params: Any) -> Any:
        opt_state = tx.init(params)
        is_sparse = isinstance(opt_state, agent_optax.SparsifyState)
        params = agent_optax.mask_params(params, opt_state) if is_sparse else params
        return jax.tree.map(jnp.copy, params), opt_state

    return init(params)


def loop(step: Callable[..., Any], begin: tuple[Any, Any], *rest: Any) -> Callable[[], Any]:
    """A closure that takes one donated step a call, from copies of params and state, through the batches in turn."""
    carried = [*jax.tree.map(jnp.copy, begin), 0]

    def run() -> Any:
        params, opt_state, turn = carried
        params, opt_state = step(params, opt_state, jnp.asarray(turn % NUM_BATCHES), *rest)
        carried[:] = params, opt_state, turn + 1
        return params, opt_state

    return run


def optimizer_step(tx: optax.GradientTransformationExtraArgs, begin: tuple[Any, Any]) -> Callable[[], Any]:
    """One donated step with fixed gradients."""
    params, _ = begin
    grads = jax.tree.map(lambda p: 1e-3 * jax.random.normal(jax.random.key(2), p.shape), params)
    extras = {"value": jnp.ones(()), "old_value": jnp.ones(()), "old_grads": jax.tree.map(jnp.copy, grads)}

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, opt_state: Any, batch_index: Any, grads: Any, extras: Any) -> Any:
        updates, opt_state = tx.update(grads, opt_state, params, batch_index=batch_index, **extras)
        return optax.apply_updates(params, updates), opt_state

    return loop(step, begin, grads, extras)


def train_step(tx: optax.GradientTransformationExtraArgs, begin: tuple[Any, Any], batch: Any) -> Callable[[], Any]:
    """One donated train step on a fixed batch."""
    grads_fn = agent_optax.value_and_grads(loss_fn)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, opt_state: Any, batch_index: Any, batch: Any) -> Any:
        (_, grads), extras = grads_fn(params, opt_state, batch)
        updates, opt_state = tx.update(grads, opt_state, params, batch_index=batch_index, **extras)
        return optax.apply_updates(params, updates), opt_state

    return loop(step, begin, batch)


def compile_costs(config: Config, sparsity: float) -> list[dict[str, Any]]:
    """One row an optimizer and depth: seconds to trace and compile, lines of the compiled step."""
    rows = []
    for depth in config.depths:
        params = {f"dense_{i}": {"kernel": jax.ShapeDtypeStruct((64, 64), jnp.float32)} for i in range(depth)}
        for name, (_, tx) in selected(config, sparsity).items():

            def step(params: Any, opt_state: Any, grads: Any, extras: Any, tx: Any = tx) -> Any:
                updates, opt_state = tx.update(grads, opt_state, params, **extras)
                return optax.apply_updates(params, updates), opt_state

            scalar = jax.ShapeDtypeStruct((), jnp.float32)
            index = jax.ShapeDtypeStruct((), jnp.int32)
            extras = {"value": scalar, "old_value": scalar, "old_grads": params, "batch_index": index}
            began = time.perf_counter()
            jax.jit(tx.init).lower(params).compile()
            initialized = time.perf_counter()
            opt_state = jax.eval_shape(tx.init, params)
            started = time.perf_counter()
            compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, opt_state, params, extras).compile()
            done = time.perf_counter()
            rows.append(
                {
                    "sparsity": sparsity,
                    "optimizer": name,
                    "kernels": depth,
                    "init_s": initialized - began,
                    "step_s": done - started,
                    "step_lines": len(compiled.as_text().splitlines()),
                }
            )
    return rows


def measure(config: Config, num_params: int, sparsity: float) -> list[dict[str, Any]]:
    """One row an optimizer."""
    params = mlp_params(num_params)
    cases = selected(config, sparsity)
    batch = jax.tree.map(lambda x: x[0], batches(1, config.batch_size))
    rows = {
        name: {"num_params": num_params, "sparsity": sparsity, "optimizer": name, "baseline": baseline}
        for name, (baseline, _) in cases.items()
    }
    begins = {name: start(tx, params) for name, (_, tx) in cases.items()}
    for stage in timed_stages(config):
        make = optimizer_step if stage == "optimizer" else functools.partial(train_step, batch=batch)
        rounds = config.rounds if stage == "optimizer" else max(config.rounds // 3, 2)
        seconds = interleaved_seconds({name: make(tx, begins[name]) for name, (_, tx) in cases.items()}, rounds)
        for name, (baseline, _) in cases.items():
            rows[name][f"{stage}_ms"] = 1e3 * statistics.median(seconds[name])
            rows[name][f"{stage}_ratio"] = median_ratio(seconds, name, baseline)
    return list(rows.values())


def timed_stages(config: Config) -> list[str]:
    """Those that run what is compiled."""
    return [stage for stage in config.stages if stage != "compile"]


def table_of(title: str, rows: list[dict[str, Any]], names: list[str], numbers: list[str]) -> Table:
    """Names to the left, numbers to the right."""
    table = Table(title=title)
    for column in [*names, *numbers]:
        table.add_column(column, justify="left" if column in names else "right")
    for row in rows:
        cells = [f"{row[c]:.2f}" if isinstance(row[c], float) else str(row[c]) for c in numbers]
        table.add_row(*(row[name] for name in names), *cells)
    return table


def main(config: Config) -> None:
    """Prints a table for each size and sparsity; writes JSON."""
    config = config.completed()
    console = Console(width=120)
    rows = []
    device = jax.devices()[0].device_kind
    if "compile" in config.stages:
        rows += compile_costs(config, config.sparsities[0])
        columns = ["kernels", "init_s", "step_s", "step_lines"]
        console.print(
            table_of(f"seconds to trace and compile, kernels of 64 x 64, {device}", rows, ["optimizer"], columns)
        )
    columns = [f"{stage}_{unit}" for stage in timed_stages(config) for unit in ("ms", "ratio")]
    for num_params in config.num_params if columns else ():
        for sparsity in config.sparsities:
            measured = measure(config, num_params, sparsity)
            rows += measured
            title = f"{num_params / 1e6:g}M parameters, {sparsity:.0%} sparse, {device}"
            console.print(table_of(title, measured, ["optimizer", "baseline"], columns))
            write_report(config.output, config, rows)  # after each: a run that is cut short leaves what it has
    write_report(config.output, config, rows)


if __name__ == "__main__":
    main(tyro.cli(Config))
