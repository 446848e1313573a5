"""Files of a suite: every epoch of every seed (CSV), the tables (Markdown), the curves (PNG)."""

from __future__ import annotations

import csv
import importlib.metadata
import platform
from pathlib import Path

import matplotlib.figure
import numpy as np

import agent_optax
from convergence.suite import Case, Curves, Suite
from convergence.training import PROBES, Run

KEYS = ("case", "method", "seed", "epoch")
FIELDS = Run._fields[:-2]  # by epoch
COLORS = ("#444444", "#b5651d", "#c2334d", "#1f5f99", "#2f7d4f", "#7a5195", "#d99000", "#00a0a0", "#a0a0a0", "#e377c2")

COSTS = {
    "evaluations": "gradient evaluations, in passes over the training images",
    "seconds": "seconds of training on one core",
}


def write_csv(path: Path, results: dict[str, dict[str, list[Run]]], seeds: tuple[int, ...]) -> None:
    """One row an epoch; columns that hold nothing are left out."""
    rows = []
    for case, methods in results.items():
        for method, runs in methods.items():
            for seed, run in zip(seeds, runs, strict=True):
                columns = dict(zip(FIELDS, run[: len(FIELDS)], strict=True))
                last = np.arange(len(run.accuracy)) == len(run.accuracy) - 1
                columns["robust_accuracy"] = np.where(last, run.robust_accuracy, np.nan)
                if run.probes is not None:
                    columns |= dict(zip(PROBES, run.probes.T, strict=True))
                for epoch in range(len(last)):
                    cells = {name: column[epoch] for name, column in columns.items()}
                    numbers = {name: f"{x:.5g}" for name, x in cells.items() if not np.isnan(x)}
                    rows.append({"case": case, "method": method, "seed": seed, "epoch": epoch + 1, **numbers})
    present = [name for name in (*KEYS, *FIELDS, "robust_accuracy", *PROBES) if any(name in row for row in rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, present, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> tuple[dict[str, dict[str, list[Run]]], tuple[int, ...]]:
    """What `write_csv` wrote."""
    of_seed: dict[tuple[str, str, int], list[dict[str, str]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            of_seed.setdefault((row["case"], row["method"], int(row["seed"])), []).append(row)
    results: dict[str, dict[str, list[Run]]] = {}
    for (case, method, _), rows in of_seed.items():

        def column(name: str, rows: list[dict[str, str]] = rows) -> np.ndarray:
            return np.array([float(row.get(name) or "nan") for row in rows])

        probes = np.stack([column(name) for name in PROBES], axis=1) if PROBES[0] in rows[0] else None
        run = Run(*map(column, FIELDS), robust_accuracy=float(column("robust_accuracy")[-1]), probes=probes)
        results.setdefault(case, {}).setdefault(method, []).append(run)
    return results, tuple(dict.fromkeys(seed for *_, seed in of_seed))


def markdown_table(rows: list[list[str]]) -> str:
    """A heading and rows."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def describe(case: Case) -> str:
    """The setting in words."""
    s = case.setting
    topology = {"set": "SET", "rigl": "RigL", "static": "a static mask", "dense": "dense"}[s.topology]
    layers = "-".join(map(str, (s.images.train_images.shape[1], *s.hidden, 10)))
    parts = [
        f"{s.dataset}, {len(s.images.train_images):,} images",
        f"MLP {layers}, ERK {s.sparsity:.0%}, {topology}",
        f"batch {s.batch_size}, rate {s.learning_rate:g}{' (steps down)' if s.decays else ''}, {s.epochs} epochs",
    ]
    if s.attack_epsilon:
        parts.append(f"PGD-{s.attack_steps} adversarial training, ε = {s.attack_epsilon:g}")
    return "; ".join(parts)


def versions() -> str:
    """Of what the numbers depend on."""
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "optax", "numpy"))
    return f"agent_optax {agent_optax.__version__}, {packages}, Python {platform.python_version()}"


def markdown(suite: Suite, results: dict[str, dict[str, list[Run]]], seeds: tuple[int, ...], command: str) -> str:
    """The tables of a suite."""
    lines = [
        f"# {suite.title}",
        "",
        f"`{command}`: seeds {seeds[0]} to {seeds[-1]}; {versions()}; one core of {platform.machine()} a run.",
        "Differences are paired by seed, ± half of the 95% interval (Student's t).",
        "",
    ]
    for case in suite.cases:
        curves = {name: Curves(runs) for name, runs in results[case.name].items()}
        lines += [f"## {case.name}", "", f"{describe(case)}.", "", markdown_table(suite.table(case, curves)), ""]
    return "\n".join(lines)


def plot(suite: Suite, results: dict[str, dict[str, list[Run]]], path: Path) -> None:
    """Accuracy over epochs and over gradient evaluations or seconds, a row of two panels a case."""
    cases = suite.cases[:4]
    figure = matplotlib.figure.Figure(figsize=(9.5, 3.2 * len(cases)), layout="constrained")
    panels = figure.subplots(len(cases), 2, squeeze=False)
    for case, (left, right) in zip(cases, panels, strict=True):
        curves = {name: Curves(runs) for name, runs in results[case.name].items()}
        means = np.concatenate([c.accuracy.mean(axis=0) for c in curves.values()])
        for i, (name, c) in enumerate(curves.items()):
            look = {"color": COLORS[i % len(COLORS)], "linewidth": 1.5, "linestyle": "--" if i >= len(COLORS) else "-"}
            left.plot(np.arange(1, c.accuracy.shape[1] + 1), c.accuracy.mean(axis=0), label=name, **look)
            right.plot(getattr(c, suite.figure_cost), c.accuracy.mean(axis=0), **look)
        for axes, label in ((left, "epoch"), (right, COSTS[suite.figure_cost])):
            axes.set(xlabel=label, ylabel="test accuracy, %", ylim=(np.percentile(means, 8) - 1, means.max() + 0.5))
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25, linewidth=0.5)
        left.set_title(case.name, fontsize=10)
        left.legend(frameon=False, fontsize=6.5, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
