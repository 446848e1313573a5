"""Variants of our methods, to choose among on seeds of their own: `--first-seed 100`."""

from convergence.setting import Setting
from convergence.suite import Case, Suite
from convergence.tables import costs_and_accuracy

TUNING = Suite(
    name="tuning",
    title="Variants of gradient regression, on seeds that serve for nothing else",
    cases=(
        Case(
            "R9",
            Setting(averages=True),
            (
                "SGD",
                "SGD, fixed batches",
                "gradient regression",
                "gradient regression, decay 0.8",
                "gradient regression, decay 0.95",
                "gradient regression, a leaf each",
                "gradient regression by position",
                "gradient regression, refresh after the topology update",
                "gradient regression, two refreshes an epoch",
                "gradient regression, cached",
                "cached, refresh after the topology update",
                "cached, two refreshes an epoch",
                "cached, a refresh every 2 epochs",
                "table, gradient regression",
                "table, decay 0.9",
                "table, in the same order",
                "table, γ 0.7",
                "table, c = 1 (SAGA)",
            ),
        ),
        Case(
            "R9 with RigL",  # whose growth the table answers with the age of each entry
            Setting(topology="rigl", averages=True),
            ("SGD", "gradient regression", "gradient regression, cached", "table, gradient regression"),
        ),
    ),
    table=costs_and_accuracy,
    smoke_methods=("SGD", "gradient regression"),
)
