"""Constant fan-in against any mask: what a structure that is fast to multiply costs in accuracy."""

from convergence.setting import Setting
from convergence.suite import Case, Suite
from convergence.tables import costs_and_accuracy

RIGL = Setting(topology="rigl", averages=True)
LABELS = (
    "fan-in",
    "fan-in of 4 together",
    "fan-in of 10 together",
    "fan-in, ablation 0.3",
    "fan-in, ablation 0.7",
    "fan-in, ablation 1",
)

PATTERNS = Suite(
    name="patterns",
    title="Constant fan-in and any mask",
    cases=tuple(
        Case(f"R9 with RigL, {name}", RIGL, (name, *(f"{name}, {label}" for label in LABELS)))
        for name in ("SGD", "gradient regression")
    ),
    table=costs_and_accuracy,
    smoke_methods=("SGD", "SGD, fan-in"),
)
