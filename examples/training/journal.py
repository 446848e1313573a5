"""What a run measures in each epoch: kept as CSV and as TensorBoard events."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

import tensorboardX


class EpochRecord(NamedTuple):
    """One row; the columns of metrics.csv."""

    epoch: int  # epochs completed
    seconds: float  # of this epoch
    learning_rate: float
    train_loss: float  # the objective, over the epoch
    train_accuracy: float  # percent, over the epoch, of the images that the loss sees first
    test_loss: float
    test_accuracy: float  # percent
    correlation: float | None  # c before scaling, the mean over the epoch
    correction_weight: float | None  # w, the same
    variance_ratio: float | None  # of corrected to raw gradients, as the coefficient estimates it
    sparsity: float | None  # of the pruned layers
    exploration_rate: float | None  # the share of weights that were ever active


class Journal:
    """metrics.csv and the events in a folder; what was written after the epoch that a run resumes from is dropped."""

    def __init__(self, folder: Path, num_epochs: int) -> None:
        self.path = folder / "metrics.csv"
        self.records = [record for record in read(self.path) if record.epoch <= num_epochs] if num_epochs else []
        with self.path.open("w", newline="") as file:
            csv.writer(file).writerows([EpochRecord._fields, *self.records])
        self.events = tensorboardX.SummaryWriter(str(folder / "tensorboard"), purge_step=num_epochs + 1)

    def write(self, record: EpochRecord) -> None:
        """Adds a row; None is an empty cell."""
        self.records.append(record)
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow(record)
        for name, number in zip(record._fields[1:], record[1:], strict=True):
            if number is not None:
                self.events.add_scalar(name, number, record.epoch)
        self.events.flush()

    def close(self) -> None:
        """Ends the event file."""
        self.events.close()


def read(path: Path) -> list[EpochRecord]:
    """The rows of metrics.csv; none if there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    numbers = [{name: float(cell) if cell else None for name, cell in row.items()} for row in rows]
    return [EpochRecord(**row | {"epoch": int(row["epoch"])}) for row in numbers]
