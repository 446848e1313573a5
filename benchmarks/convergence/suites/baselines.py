"""Other optimizers and other remedies: Figures 5, 28 and 33, Tables 5 and 10 of the paper."""

from convergence.setting import Setting
from convergence.suite import Case, Suite
from convergence.tables import costs_and_accuracy

BASELINES = Suite(
    name="baselines",
    title="Other optimizers and other corrections",
    cases=(
        Case(
            "R9",
            Setting(averages=True),
            (
                "SGD",
                "Adam",
                "SGD, rate x 0.3",
                "SGD, rate x 0.1",
                "SGD, 2x batch",
                "SGD, 3x batch",
                "AGENT as published",
                "SVRG",
                "α-SVRG",
                "MVR (STORM), a = 0.1",
                "MVR (STORM), a = 0.5",
                "AGENT + MVR",
                "MARS",
                "gradient regression",
                "table, gradient regression",
            ),
        ),
    ),
    table=costs_and_accuracy,
    smoke_methods=("SGD", "AGENT + MVR"),
)
