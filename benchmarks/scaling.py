"""How the cost grows with the number of parameters and of devices, and what a step sends between devices.

A device here is a thread of this machine that XLA counts as one: that tells what is sent, not how fast.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --num-params 1_000_000 --devices 1 8 --plot ""
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import matplotlib.figure
import optax
import tyro
from interleaved import interleaved_seconds, median_ratio, write_report
from networks import mlp_params
from overhead import NEVER, momentum, start
from rich.console import Console
from rich.table import Table

import agent_optax

TOPOLOGIES = {"rigl": agent_optax.rigl, "set_": agent_optax.set_}
# A threshold is found by a loop whose length depends on the scores: about ten turns, and never more than three a bit,
# since every third turn halves a bracket of 32-bit numbers. Bytes are counted at that bound.
MOST_TURNS = 96


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure."""

    num_params: tuple[int, ...] = (1_000_000, 5_000_000, 25_000_000)  # on one device
    devices: tuple[int, ...] = (1, 2, 4, 8)
    sharded_params: int = 5_000_000  # of the network that is spread over devices
    topologies: tuple[Literal["rigl", "set_"], ...] = ("rigl", "set_")
    sparsity: float = 0.9
    rounds: int = 15
    output: Path | None = None  # where the JSON goes
    plot: Path | None = None  # where the figure goes
    smoke: bool = False  # one tiny network on two devices, one topology, two rounds: to see that it runs
    worker: bool = False  # used by the script itself: measure on the devices there are, print JSON

    def completed(self) -> Config:
        """With the sizes of a smoke test where one is asked for."""
        if not self.smoke:
            return self
        small = {"num_params": (), "devices": (2,), "sharded_params": 20_000, "topologies": ("rigl",), "rounds": 2}
        return dataclasses.replace(self, **small)


# ---------------------------------------------------------------------------------------------------------------------
# What a compiled program sends
# ---------------------------------------------------------------------------------------------------------------------

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
ITEM_BITS = {"pred": 8, "bf16": 16, "f16": 16, "token": 0}  # of the other types the name tells
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
TRIPS = re.compile(r"known_trip_count[^0-9]*(\d+)")


class Sent(NamedTuple):
    """One kind of collective operation of a program."""

    kind: str  # "all-reduce", ...
    in_topology_update: bool  # whether it stands inside a loop of the program: the branch of the topology update
    calls: int  # how often it runs at most
    operand_bytes: int  # on one device, summed over these calls
    largest: int  # bytes of the largest call


def shape_bytes(shape: str) -> int:
    """Of an HLO shape such as ``f32[8,16]{1,0}`` or ``(f32[], s32[4])``."""
    total = 0
    for dtype, dims in re.findall(r"([a-z][a-z0-9]*)\[([\d,]*)\]", shape):
        bits = ITEM_BITS.get(dtype) if dtype in ITEM_BITS else int(re.search(r"\d+", dtype).group())
        size = 1
        for dim in filter(None, dims.split(",")):
            size *= int(dim)
        total += size * bits // 8
    return total


def sent(hlo: str, most_turns: int = MOST_TURNS) -> list[Sent]:
    """The collective operations of a compiled program, by kind and place.

    A loop of unknown length counts `most_turns` times if it stands within another, and once if it does not: the outer
    one is the loop of zero or one turns around the topology update.
    """
    computations, entry = _computations(hlo)
    tally: dict[tuple[str, bool], list[int]] = {}

    def visit(name: str, times: int, in_loop: bool) -> None:
        shapes = {result: shape for result, shape, _, _ in computations[name]}
        for _, _, opcode, rest in computations[name]:
            kind = opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                operands = re.findall(r"%?([\w.\-]+)", rest[: rest.index(")")])
                size = sum(shape_bytes(shapes[operand]) for operand in operands if operand in shapes)
                calls = tally.setdefault((kind, in_loop), [0, 0, 0])
                calls[:] = calls[0] + times, calls[1] + times * size, max(calls[2], size)
            turns = 1
            if opcode == "while":
                known = TRIPS.search(rest)
                turns = int(known.group(1)) if known else most_turns if in_loop else 1
            for called in _called(rest):
                visit(called, times * turns, in_loop or opcode == "while")

    visit(entry, 1, False)
    return [Sent(kind, in_loop, *numbers) for (kind, in_loop), numbers in sorted(tally.items())]


def _computations(hlo: str) -> tuple[dict[str, list[tuple[str, str, str, str]]], str]:
    """Name -> instructions (result, shape, opcode, the rest of the line); and the name of the entry."""
    computations: dict[str, list[tuple[str, str, str, str]]] = {}
    entry, name = "", ""
    for line in hlo.splitlines():
        header = re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if header:
            name = header.group(2)
            computations[name] = []
            entry = name if header.group(1) else entry
        elif name and (found := INSTRUCTION.match(line)):
            computations[name].append(found.groups())
    return computations, entry


def _called(rest: str) -> list[str]:
    """The computations that an instruction calls."""
    branches = BRANCHES.search(rest)
    return CALLED.findall(rest) + (re.findall(r"[\w.\-]+", branches.group(1)) if branches else [])


# ---------------------------------------------------------------------------------------------------------------------
# Timing
# ---------------------------------------------------------------------------------------------------------------------


def cases(config: Config) -> dict[str, optax.GradientTransformationExtraArgs]:
    """Plain SGD, and the same made sparse; update_every=1 is due at each step, NEVER at none."""
    chosen = {"sgd": momentum()}
    for name in config.topologies:
        for step, every in (("step", NEVER), ("update", 1)):
            topology = TOPOLOGIES[name](update_every=every)
            chosen[f"{name} {step}"] = agent_optax.sparsify(momentum(), topology, sparsity=config.sparsity)
    return chosen


def spread(params: Any, mesh: jax.sharding.Mesh) -> Any:
    """Kernels sharded by rows, biases on every device."""

    def place(p: jax.Array) -> jax.Array:
        spec = jax.sharding.PartitionSpec(*(("devices",) if p.ndim == 2 else ()))
        return jax.device_put(p, jax.sharding.NamedSharding(mesh, spec))

    return jax.tree.map(place, params)


def compiled_step(
    tx: optax.GradientTransformationExtraArgs, params: Any
) -> tuple[Callable[[], Any], jax.stages.Compiled]:
    """A closure that takes one donated optimizer step with fixed gradients; and its program."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, opt_state: Any, grads: Any) -> Any:
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    grads = jax.tree.map(lambda p: 1e-3 * jax.random.normal(jax.random.key(2), p.shape), params)
    grads = jax.tree.map(lambda g, p: jax.device_put(g, p.sharding), grads, params)
    held = list(start(tx, params))
    held[:] = step(*held, grads)  # shardings that init left open settle here
    program = step.lower(*held, grads).compile()

    def run() -> Any:
        held[:] = program(*held, grads)
        return held

    return run, program


def measure(params: Any, config: Config) -> list[dict[str, Any]]:
    """One row a case: milliseconds, the ratio to plain SGD, and what is sent."""
    steps = {name: compiled_step(tx, params) for name, tx in cases(config).items()}
    seconds = interleaved_seconds({name: run for name, (run, _) in steps.items()}, config.rounds)
    return [
        {
            "step": name,
            "ms": 1e3 * statistics.median(seconds[name]),
            "ratio": median_ratio(seconds, name, "sgd"),
            "sent": [collective._asdict() for collective in sent(program.as_text())],
        }
        for name, (_, program) in steps.items()
    ]


def measure_devices(config: Config) -> list[dict[str, Any]]:
    """On all devices that this process has."""
    mesh = jax.make_mesh((jax.device_count(),), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    params = spread(mlp_params(config.sharded_params, multiple_of=8), mesh)
    return [{"devices": jax.device_count(), **row} for row in measure(params, config)]


def on_devices(num_devices: int, config: Config) -> list[dict[str, Any]]:
    """`measure_devices` in a process with this many devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={num_devices}"
    arguments = ["--worker", "--sharded-params", config.sharded_params, "--sparsity", config.sparsity]
    arguments += ["--rounds", config.rounds, "--topologies", *config.topologies]
    command = [sys.executable, __file__, *map(str, arguments)]
    path = os.pathsep.join(filter(None, sys.path))  # the same packages, installed or not
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the measurement on {num_devices} devices failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------------------------------------------------


def bytes_sent(row: dict[str, Any], in_topology_update: bool) -> int:
    """Of a row, by one device."""
    return sum(s["operand_bytes"] for s in row["sent"] if s["in_topology_update"] == in_topology_update)


def kinds_sent(row: dict[str, Any]) -> str:
    """What a row sends, in words."""
    places = {True: "in an update", False: "every step"}
    return (
        ", ".join(f"{s['kind']} (<= {s['largest']} B, {places[s['in_topology_update']]})" for s in row["sent"]) or "-"
    )


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Cost against parameters and devices, and bytes against devices; `rows` with some of each."""
    figure = matplotlib.figure.Figure(figsize=(11, 3.4), layout="constrained")
    by_size, by_devices, by_bytes = figure.subplots(1, 3)
    on_one, on_many = ([row for row in rows if row["table"] == t] for t in ("parameters", "devices"))
    for axes, chosen, x in ((by_size, on_one, "num_params"), (by_devices, on_many, "devices")):
        for name in dict.fromkeys(row["step"] for row in chosen if row["step"] != "sgd"):
            points = [(row[x], row["ratio"]) for row in chosen if row["step"] == name]
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set(xscale="log", yscale="log", ylabel="time / time of plain SGD")
    by_size.set(xlabel="parameters", title="one device")
    by_devices.set(xlabel="devices", title="sharded by rows", xticks=sorted({r["devices"] for r in on_many}))
    for name in dict.fromkeys(row["step"].split()[0] for row in on_many if row["step"] != "sgd"):
        chosen = [row for row in on_many if row["step"] == f"{name} update"]
        devices = [row["devices"] for row in chosen]
        by_bytes.plot(devices, [bytes_sent(row, True) for row in chosen], marker="o", label=f"{name}, update")
        by_bytes.plot(devices, [bytes_sent(row, False) for row in chosen], marker="s", label=f"{name}, every step")
    whole = on_many[0]["whole_array_bytes"]
    by_bytes.axhline(whole, color="grey", linestyle="--", linewidth=0.8, label="one array of scores")
    by_bytes.set(xscale="log", yscale="symlog", xlabel="devices", ylabel="bytes sent by a device", title="on the wire")
    by_bytes.set_ylim(bottom=0)
    by_bytes.set_xticks(sorted({r["devices"] for r in on_many}))
    for axes in (by_devices, by_bytes):
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
    by_devices.legend(fontsize="small", frameon=False)
    by_bytes.legend(fontsize="small", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def main(config: Config) -> None:
    """Prints two tables; writes JSON and a figure."""
    config = config.completed()
    if config.worker:
        print(json.dumps(measure_devices(config)))
        return
    rows: list[dict[str, Any]] = []
    console = Console(width=140)
    table = Table(title=f"One device, {config.sparsity:.0%} sparse, dense storage")
    for column in ("parameters", "step", "ms", "ratio to sgd"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for num_params in config.num_params:
        for row in measure(mlp_params(num_params), config):
            rows.append({"table": "parameters", "num_params": num_params, **row})
            table.add_row(f"{num_params / 1e6:g}M", row["step"], f"{row['ms']:.2f}", f"{row['ratio']:.2f}")
    console.print(table)
    table = Table(title=f"{config.sharded_params / 1e6:g}M parameters sharded by rows, dense storage")
    for column in ("devices", "step", "ms", "ratio to sgd", "bytes, every step", "bytes, update", "collectives"):
        table.add_column(column, justify="left" if column in ("step", "collectives") else "right")
    for num_devices in config.devices:
        for row in on_devices(num_devices, config):
            rows.append({"table": "devices", "whole_array_bytes": 4 * config.sharded_params, **row})
            numbers = [f"{row['ms']:.2f}", f"{row['ratio']:.2f}", *(str(bytes_sent(row, b)) for b in (False, True))]
            table.add_row(str(num_devices), row["step"], *numbers, kinds_sent(row))
    console.print(table)
    write_report(config.output, config, rows)
    if config.plot:
        draw(rows, config.plot)


if __name__ == "__main__":
    main(tyro.cli(Config))
