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
from convergence.training import Run

FIELDS = Run._fields[:-1]  # by epoch
COLORS = ("#444444", "#b5651d", "#c2334d", "#1f5f99", "#2f7d4f", "#7a5195", "#d99000", "#00a0a0", "#a0a0a0", "#e377c2")


def write_csv(path: Path, results: dict[str, dict[str, list[Run]]], seeds: tuple[int, ...]) -> None:
    """One row an epoch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["case", "method", "seed", "epoch", *FIELDS, "robust_accuracy"])
        for case, methods in results.items():
            for method, runs in methods.items():
                for seed, run in zip(seeds, runs, strict=True):
                    columns = np.array(run[:-1]).T
                    for epoch, row in enumerate(columns, start=1):
                        robust = run.robust_accuracy if epoch == len(columns) else np.nan
                        cells = ("" if np.isnan(x) else f"{x:.5g}" for x in (*row, robust))
                        writer.writerow([case, method, seed, epoch, *cells])


def read_csv(path: Path) -> tuple[dict[str, dict[str, list[Run]]], tuple[int, ...]]:
    """What `write_csv` wrote."""
    results: dict[str, dict[str, dict[int, list[list[float]]]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            numbers = [float(row[field] or "nan") for field in (*FIELDS, "robust_accuracy")]
            of_method = results.setdefault(row["case"], {}).setdefault(row["method"], {})
            of_method.setdefault(int(row["seed"]), []).append(numbers)
    seeds: tuple[int, ...] = ()
    runs: dict[str, dict[str, list[Run]]] = {}
    for case, methods in results.items():
        for method, by_seed in methods.items():
            seeds = tuple(by_seed)
            arrays = [np.array(rows).T for rows in by_seed.values()]
            runs.setdefault(case, {})[method] = [Run(*a[:-1], robust_accuracy=float(a[-1, -1])) for a in arrays]
    return runs, seeds


def markdown_table(rows: list[list[str]]) -> str:
    """A heading and rows."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def describe(case: Case) -> str:
    """The setting in words."""
    s = case.setting
    topology = {"set": "SET", "rigl": "RigL", "static": "a static mask"}[s.topology]
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
    """Accuracy over epochs and over gradient evaluations, a row of two panels a case."""
    cases = suite.cases[:4]
    figure = matplotlib.figure.Figure(figsize=(9.5, 3.2 * len(cases)), layout="constrained")
    panels = figure.subplots(len(cases), 2, squeeze=False)
    for case, (left, right) in zip(cases, panels, strict=True):
        curves = {name: Curves(runs) for name, runs in results[case.name].items()}
        means = np.concatenate([c.accuracy.mean(axis=0) for c in curves.values()])
        for i, (name, c) in enumerate(curves.items()):
            look = {"color": COLORS[i % len(COLORS)], "linewidth": 1.5, "linestyle": "--" if i >= len(COLORS) else "-"}
            left.plot(np.arange(1, c.accuracy.shape[1] + 1), c.accuracy.mean(axis=0), label=name, **look)
            right.plot(c.evaluations, c.accuracy.mean(axis=0), **look)
        for axes, label in ((left, "epoch"), (right, "gradient evaluations, in passes over the training images")):
            axes.set(xlabel=label, ylabel="test accuracy, %", ylim=(np.percentile(means, 8) - 1, means.max() + 0.5))
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25, linewidth=0.5)
        left.set_title(case.name, fontsize=10)
        left.legend(frameon=False, fontsize=6.5, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
