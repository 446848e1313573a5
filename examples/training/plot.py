"""The curves of a run."""

from __future__ import annotations

from pathlib import Path

import matplotlib.figure

from training.journal import EpochRecord


def plot(records: list[EpochRecord], title: str, path: Path) -> None:
    """Loss, accuracy, and what correction and topology did, by epoch."""
    figure = matplotlib.figure.Figure(figsize=(11, 3.4), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    panels = {
        "loss": {"training": "train_loss", "test": "test_loss"},
        "accuracy, %": {"training": "train_accuracy", "test": "test_accuracy"},
        "correction and topology": {
            "correlation c": "correlation",
            "weight w": "correction_weight",
            "explored (R_s)": "exploration_rate",
        },
    }
    epochs = [record.epoch for record in records]
    for axes, (label, curves) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for name, field in curves.items():
            numbers = [getattr(record, field) for record in records]
            if None not in numbers:
                axes.plot(epochs, numbers, label=name, marker="." if len(epochs) == 1 else None)
        axes.set(xlabel="epoch", ylabel=label)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
