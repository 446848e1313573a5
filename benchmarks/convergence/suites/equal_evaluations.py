"""As many gradient evaluations for everyone: is correction the best use of them?"""

from convergence.setting import Setting
from convergence.suite import Case, Suite
from convergence.tables import costs_and_accuracy

SETTING = Setting(averages=True)

EQUAL_EVALUATIONS = Suite(
    name="equal-evaluations",
    title="Equal numbers of gradient evaluations",
    cases=(
        Case("one an epoch", SETTING, ("SGD", "table, gradient regression")),
        Case("two an epoch: batches twice as large", SETTING, ("SGD, 2x batch", "gradient regression, cached")),
        Case("two an epoch: twice the epochs", SETTING, ("SGD, 2x epochs", "gradient regression, cached")),
        Case("three an epoch: batches three times as large", SETTING, ("SGD, 3x batch", "gradient regression")),
    ),
    table=costs_and_accuracy,
    smoke_methods=("SGD", "table, gradient regression"),
)
