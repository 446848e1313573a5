"""Rows of the tables that suites make of their curves."""

from __future__ import annotations

import numpy as np

from convergence import comparison
from convergence.methods import METHODS
from convergence.suite import Case, Curves


def _or_dash(number: float, digits: int = 1) -> str:
    return "never" if np.isnan(number) else f"{number:.{digits}f}"


def costs_and_accuracy(case: Case, curves: dict[str, Curves]) -> list[list[str]]:
    """Accuracy in both halves, the paired difference to the baseline, and what the baseline's accuracy costs."""
    baseline = curves[case.methods[0]]
    target = comparison.target_accuracy(baseline.accuracy)
    epochs = np.arange(1, case.setting.epochs + 1)
    half = len(epochs) // 2
    averages = case.setting.averages
    heading = [
        "method",
        "evaluations an epoch",
        "seconds an epoch",
        f"accuracy, epochs {min(2, half)}-{half}",
        f"epochs {half + 1}-{len(epochs)}",
        f"minus {case.methods[0]}",
        "jitter",
        *(["with weight average", f"minus {case.methods[0]} with average"] if averages else []),
        f"epochs to {target:.2f}",
        "evaluations to it",
        "seconds to it",
    ]
    rows = [heading]
    for name, c in curves.items():
        later = comparison.later_half(c.accuracy)
        difference = comparison.paired_difference(later, comparison.later_half(baseline.accuracy))
        row = [
            name,
            f"{c.evaluations[-1] / len(epochs):.3g}",
            f"{c.seconds[-1] / len(epochs):.2f}",
            f"{comparison.earlier_half(c.accuracy).mean():.2f}",
            f"{later.mean():.2f}",
            "-" if c is baseline else str(difference),
            f"{comparison.jitter(c.accuracy):.2f}",
        ]
        if averages:
            average = comparison.later_half(c.average_accuracy)
            difference = comparison.paired_difference(average, comparison.later_half(baseline.average_accuracy))
            row += [f"{average.mean():.2f}", "-" if c is baseline else str(difference)]
        costs = (epochs, c.evaluations, c.seconds)
        row += [_or_dash(comparison.cost_to(target, c.accuracy, cost)) for cost in costs]
        rows.append(row)
    return rows


def at_epochs(case: Case, curves: dict[str, Curves]) -> list[list[str]]:
    """Accuracy at a fifth, two fifths, ... of the epochs, with the paired difference to the baseline."""
    baseline = curves[case.methods[0]]
    last = case.setting.epochs
    epochs = sorted({max(round(last * k / 5), 1) for k in range(1, 6)})
    rows = [["method", "evaluations an epoch", *(f"epoch {e}" for e in epochs)]]
    for name, c in curves.items():
        row = [name, f"{c.evaluations[-1] / last:.3g}"]
        for e in epochs:
            cell = f"{c.accuracy[:, e - 1].mean():.2f}"
            if c is not baseline:
                difference = comparison.paired_difference(c.accuracy[:, e - 1], baseline.accuracy[:, e - 1])
                cell += f" ({difference})"
            row.append(cell)
        rows.append(row)
    return rows


def to_targets(case: Case, curves: dict[str, Curves]) -> list[list[str]]:
    """Epochs, and gradient evaluations, to each of five accuracies up to the baseline's."""
    highest = comparison.target_accuracy(curves[case.methods[0]].accuracy)
    targets = [highest - below for below in (4, 2, 1, 0.5, 0)]
    epochs = np.arange(1, case.setting.epochs + 1)
    rows = [["method", *(f"{target:.1f}%" for target in targets)]]
    for name, c in curves.items():
        row = [name]
        for target in targets:
            needed, evaluations = (comparison.cost_to(target, c.accuracy, cost) for cost in (epochs, c.evaluations))
            row.append("never" if np.isnan(needed) else f"{needed:.1f} epochs, {evaluations:.1f} evaluations")
        rows.append(row)
    return rows


def seconds_to_targets(case: Case, curves: dict[str, Curves]) -> list[list[str]]:
    """Seconds to accuracies below the baseline's, alone and over the baseline's to its own less half a point."""
    baseline = curves[case.methods[0]]
    first = case.methods[0]
    end = comparison.target_accuracy(baseline.accuracy)
    targets = [end - below for below in (2, 1, 0.5, 0)]
    reference = comparison.cost_to(targets[2], baseline.accuracy, baseline.seconds)
    rows = [
        [
            "network",
            "rate",
            "seconds an epoch",
            "accuracy, last epochs",
            f"minus {first}",
            *(f"seconds to {t:.1f}%" for t in targets),
            f"seconds to {targets[2]:.1f}%, over {first}",
        ]
    ]
    for name, c in curves.items():
        last = c.accuracy[:, -comparison.LAST_EPOCHS :].mean(axis=1)
        difference = comparison.paired_difference(last, baseline.accuracy[:, -comparison.LAST_EPOCHS :].mean(axis=1))
        seconds = [comparison.cost_to(target, c.accuracy, c.seconds) for target in targets]
        rows.append(
            [
                name,
                f"{METHODS[name].own(case.setting).learning_rate:g}",
                f"{c.seconds[-1] / case.setting.epochs:.2f}",
                f"{last.mean():.2f}",
                "-" if c is baseline else str(difference),
                *map(_or_dash, seconds),
                _or_dash(seconds[2] / reference, 2),
            ]
        )
    return rows


def last_accuracies(case: Case, curves: dict[str, Curves]) -> list[list[str]]:
    """Accuracy over the last epochs, mean and standard deviation over seeds."""
    rows = [["method", "accuracy, last epochs"]]
    for name, c in curves.items():
        last = c.accuracy[:, -comparison.LAST_EPOCHS :].mean(axis=1)
        rows.append([name, f"{last.mean():.2f} ± {last.std(ddof=1):.2f}"])
    return rows


def clean_and_robust(case: Case, curves: dict[str, Curves]) -> list[list[str]]:
    """Accuracy after the last epoch, without and with an attack, and paired differences to the baseline."""
    baseline = curves[case.methods[0]]
    first = case.methods[0]
    rows = [["method", "evaluations an epoch", "clean", f"minus {first}", "under PGD-20", f"minus {first}"]]
    for name, c in curves.items():
        row = [name, f"{c.evaluations[-1] / case.setting.epochs:.3g}"]
        for values, of_baseline in (
            (c.accuracy[:, -1], baseline.accuracy[:, -1]),
            (c.robust_accuracy, baseline.robust_accuracy),
        ):
            difference = comparison.paired_difference(values, of_baseline)
            row += [f"{values.mean():.2f}", "-" if c is baseline else str(difference)]
        rows.append(row)
    return rows


def gradients(case: Case, curves: dict[str, Curves]) -> list[list[str]]:
    """What scatters, what is alike, and what a correction leaves, at the end of some epochs; means over seeds."""
    columns = {
        "correlation with the snapshot": ("true_correlation", ".2f"),
        "with perturbed weights": ("perturbed_correlation", ".2f"),
        "c*": ("best_coefficient", ".2f"),
        "c^ from losses": ("loss_coefficient", ".2f"),
        "variance left at c*": ("best_variance_ratio", ".2f"),
        "at c^": ("loss_variance_ratio", ".2f"),
        "gradient variance": ("gradient_variance", ".3g"),
        "gradient norm": ("gradient_norm", ".3g"),
    }
    rows = [["method", "epoch", "accuracy", *columns]]
    last = case.setting.epochs
    for name, c in curves.items():
        for e in sorted({1, max(last // 2, 1), last}):
            probes = [f"{c.probes[field][:, e - 1].mean():{form}}" for field, form in columns.values()]
            rows.append([name, str(e), f"{c.accuracy[:, e - 1].mean():.2f}", *probes])
    return rows
