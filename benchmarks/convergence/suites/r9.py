"""R9: whether correction works, at what cost, next to what else could be done with as many gradients."""

from convergence.setting import Setting
from convergence.suite import Case, Suite
from convergence.tables import costs_and_accuracy

R9 = Suite(
    name="r9",
    title="R9: corrected gradients in a 99% sparse network",
    cases=(
        Case(
            "R9",
            Setting(averages=True),
            (
                "SGD",
                "AGENT as published",
                "loss regression, γ 1, α 1",
                "SVRG",
                "gradient regression",
                "gradient regression, cached",
                "table, gradient regression",
                "SGD, 2x batch",
                "SGD, 3x batch",
            ),
        ),
    ),
    table=costs_and_accuracy,
    smoke_methods=("SGD", "gradient regression"),
    smoke_rewires=True,
)
