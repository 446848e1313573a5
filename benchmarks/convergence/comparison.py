"""What is read off runs: paired differences with their intervals, and what a target accuracy costs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.stats

LAST_EPOCHS = 3  # of the baseline, whose mean is the target: a single epoch's accuracy is noise


class Interval(NamedTuple):
    """A mean and half of its 95% interval."""

    mean: float
    margin: float

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ± {self.margin:.2f}"


def paired_difference(values: np.ndarray, baseline: np.ndarray) -> Interval:
    """Of two methods, seed by seed [S]: the mean difference with the interval of Student's paired t test."""
    values, baseline = np.asarray(values, float), np.asarray(baseline, float)
    if values.shape != baseline.shape or values.ndim != 1 or len(values) < 2:
        raise ValueError(f"a paired difference needs the same two seeds or more, got {values.shape}, {baseline.shape}")
    difference = values - baseline
    margin = scipy.stats.t.ppf(0.975, len(difference) - 1) * scipy.stats.sem(difference)
    return Interval(float(difference.mean()), float(margin))


def later_half(accuracy: np.ndarray) -> np.ndarray:
    """The mean over the second half of the epochs, for each seed: [S, E] -> [S]."""
    return accuracy[:, accuracy.shape[1] // 2 :].mean(axis=1)


def earlier_half(accuracy: np.ndarray) -> np.ndarray:
    """The mean over the first half of the epochs but the first, for each seed: [S, E] -> [S]."""
    half = accuracy.shape[1] // 2
    return accuracy[:, min(1, half - 1) : half].mean(axis=1)


def jitter(accuracy: np.ndarray) -> float:
    """The standard deviation from epoch to epoch in the second half, around each seed's own mean."""
    later = accuracy[:, accuracy.shape[1] // 2 :]
    return float(np.sqrt(np.mean(np.var(later, axis=1, ddof=1)))) if later.shape[1] > 1 else float("nan")


def target_accuracy(baseline: np.ndarray) -> float:
    """The baseline's mean over its last epochs and all seeds."""
    return float(baseline[:, -LAST_EPOCHS:].mean())


def cost_to(target: float, accuracy: np.ndarray, cost: np.ndarray) -> float:
    """The cost [E] at which the mean curve of [S, E] first reaches the target, by linear interpolation; else nan.

    Before the first epoch nothing is known: a curve that starts above the target costs one epoch.
    """
    curve = accuracy.mean(axis=0)
    reached = np.flatnonzero(curve >= target)
    if not len(reached):
        return float("nan")
    i = reached[0]
    if i == 0:
        return float(cost[0])
    share = (target - curve[i - 1]) / (curve[i] - curve[i - 1])
    return float(cost[i - 1] + share * (cost[i] - cost[i - 1]))
