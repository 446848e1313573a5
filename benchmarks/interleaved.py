"""Timing of several functions side by side: noisy machines slow all of them alike, so their ratios hold."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


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
