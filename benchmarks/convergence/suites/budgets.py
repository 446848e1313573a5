"""Cheaper refreshes: a sub-sample (Figure 29 of the paper), fewer of them, or only where they pay."""

from convergence.setting import Setting
from convergence.suite import Case, Suite
from convergence.tables import costs_and_accuracy

BUDGETS = Suite(
    name="budgets",
    title="Cheaper refreshes",
    cases=(
        Case(
            "R9",
            Setting(averages=True),
            (
                "SGD",
                "gradient regression",
                "gradient regression, 30% sub-sample",
                "gradient regression, 10% sub-sample",
                "gradient regression, a refresh every 2 epochs",
                "gradient regression, a refresh every 5 epochs",
                "gradient regression, refresh where the ratio is above 0.5",
                "gradient regression, cached",
                "cached, a refresh every 2 epochs",
                "table, gradient regression",
            ),
        ),
    ),
    table=costs_and_accuracy,
    seeds=4,
    smoke_methods=("SGD", "gradient regression, 10% sub-sample"),
)
