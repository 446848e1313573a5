"""No layer without a weight: one that has none passes nothing on."""

from __future__ import annotations

import warnings
from collections.abc import Sequence


def with_floors(
    names: Sequence[str], numbers: Sequence[int], floors: Sequence[int], units: Sequence[int], keeps_total: bool
) -> list[int]:
    """The numbers, at least their floors; the largest gives what the others get, if the total is to stay.

    Warns, naming the leaves, where a floor binds.
    """
    raised = [max(number, floor) for number, floor in zip(numbers, floors, strict=True)]
    bound = [i for i, (new, old) in enumerate(zip(raised, numbers, strict=True)) if new > old]
    if not bound:
        return raised
    surplus = sum(raised) - sum(numbers)
    while keeps_total and surplus > 0:
        largest = max(range(len(raised)), key=lambda i: raised[i] - floors[i])
        if raised[largest] - units[largest] < floors[largest] or units[largest] > surplus:
            break  # all are at their floors, or blocks are larger than what is to be given
        given = min(surplus, raised[largest] - floors[largest]) // units[largest] * units[largest]
        raised[largest] -= given
        surplus -= given
    warnings.warn(
        "at this sparsity some layers would have no active weight, and the network would pass nothing on: "
        f"{', '.join(f'{names[i]} gets {raised[i]}' for i in bound)}. Pass a lower sparsity, another distribution=, or "
        "leave them out with where=; allow_empty_layers=True allows layers without any.",
        stacklevel=2,
    )
    return raised
