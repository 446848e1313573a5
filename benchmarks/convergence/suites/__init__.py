"""The suites by name."""

from __future__ import annotations

from convergence.suite import Suite
from convergence.suites.ablations import ABLATIONS
from convergence.suites.accuracy_at_epochs import ACCURACY_AT_EPOCHS
from convergence.suites.adversarial import ADVERSARIAL
from convergence.suites.baselines import BASELINES
from convergence.suites.budgets import BUDGETS
from convergence.suites.epochs_to_accuracy import EPOCHS_TO_ACCURACY
from convergence.suites.equal_evaluations import EQUAL_EVALUATIONS
from convergence.suites.patterns import PATTERNS
from convergence.suites.r9 import R9
from convergence.suites.time_to_accuracy import TIME_TO_ACCURACY, TIME_TO_ACCURACY_RATES
from convergence.suites.tuning import TUNING
from convergence.suites.variance_and_correlation import VARIANCE_AND_CORRELATION

SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        R9,
        BASELINES,
        ABLATIONS,
        EQUAL_EVALUATIONS,
        ACCURACY_AT_EPOCHS,
        EPOCHS_TO_ACCURACY,
        VARIANCE_AND_CORRELATION,
        BUDGETS,
        ADVERSARIAL,
        PATTERNS,
        TUNING,
        TIME_TO_ACCURACY,
        TIME_TO_ACCURACY_RATES,
    )
}
