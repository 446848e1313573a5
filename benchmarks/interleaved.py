"""Timing of several functions side by side: noisy machines slow all of them alike, so their ratios hold."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax

import agent_optax


def interleaved_seconds(steps: dict[str, Callable[[], Any]], rounds: int, warmup: int = 3) -> dict[str, list[float]]:
    """Seconds of each call of each step; a step returns what must be waited for.

    Each round takes all steps, in an order of its own: what the step before left in the caches favours none.
    """
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(warmup + rounds):
        for name in order.sample(list(steps), len(steps)):
            start = time.perf_counter()
            jax.block_until_ready(steps[name]())
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(seconds: dict[str, list[float]], name: str, baseline: str) -> float:
    """The median over rounds of the time of `name` over the time of `baseline` in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[baseline], strict=True))


def write_report(path: Path | None, config: Any, rows: list[dict[str, Any]]) -> None:
    """JSON with what was measured, on what, and with which versions; nothing without a path."""
    if path is None:
        return
    settings = {name: value for name, value in dataclasses.asdict(config).items() if not isinstance(value, Path)}
    report = {
        "device": str(jax.devices()[0]),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": {module.__name__: module.__version__ for module in (jax, optax, agent_optax)},
        "settings": settings,
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
