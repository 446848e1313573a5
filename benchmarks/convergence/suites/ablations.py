"""Parts of the correction taken away or changed: Table 6, Figures 22, 23, 30 and 31 of the paper."""

from convergence.setting import Setting
from convergence.suite import Case, Suite
from convergence.tables import costs_and_accuracy

ABLATIONS = Suite(
    name="ablations",
    title="Coefficient, scaling and smoothing",
    cases=(
        Case(
            "R9",
            Setting(averages=True),
            (
                "SGD",
                "fixed c = 0.001",
                "fixed c = 0.01",
                "fixed c = 0.1",
                "fixed c = 0.5",
                "SVRG",
                "AGENT as published",
                "γ 0.1, α 1",
                "γ 0.5, α 0.3",
                "γ 1, α 0.3 (no γ)",
                "loss regression, γ 1, α 1",
                "gradient regression, γ 0.1",
                "gradient regression",
            ),
        ),
    ),
    table=costs_and_accuracy,
    seeds=4,
    smoke_methods=("SGD", "AGENT as published"),
)
