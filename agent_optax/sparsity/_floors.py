"""No layer without a weight: one that has none passes nothing on."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple


class Floor(NamedTuple):
    """How few active units a layer may have, and what a unit is."""

    name: str
    fewest: int  # units
    step: int  # units by which the number can change
    unit_size: int  # weights of a unit


def with_floors(numbers: Sequence[int], floors: Sequence[Floor], keeps_total: bool) -> list[int]:
    """The numbers of active units, at least their floors; if weights are to stay, the largest gives.

    Warns, naming the layers, where a floor binds.
    """
    raised = [max(number, floor.fewest) for number, floor in zip(numbers, floors, strict=True)]
    bound = [i for i, (new, old) in enumerate(zip(raised, numbers, strict=True)) if new > old]
    if not bound:
        return raised
    surplus = sum((new - old) * floor.unit_size for new, old, floor in zip(raised, numbers, floors, strict=True))
    while keeps_total and surplus > 0:
        largest = max(range(len(raised)), key=lambda i: (raised[i] - floors[i].fewest) * floors[i].unit_size)
        _, fewest, step, unit_size = floors[largest]
        num_steps = min(surplus // (step * unit_size), (raised[largest] - fewest) // step)
        if num_steps == 0:
            break  # all are at their floors, or blocks are larger than what is to be given
        raised[largest] -= num_steps * step
        surplus -= num_steps * step * unit_size
    given = ", ".join(f"{floors[i].name} gets {raised[i] * floors[i].unit_size}" for i in bound)
    warnings.warn(
        "at this sparsity some layers would have no active weight, and the network would pass nothing on: "
        f"{given}. Pass a lower sparsity, another distribution=, or leave them out with where=; "
        "allow_empty_layers=True allows layers without any.",
        stacklevel=2,
    )
    return raised
