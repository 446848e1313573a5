"""Seconds to equal accuracy: dense, masked and sparse networks."""

import dataclasses

from convergence.methods import RATES, TIMED
from convergence.setting import Setting
from convergence.suite import Case, Suite
from convergence.tables import last_accuracies, seconds_to_targets

SETTING = Setting(
    num_train=None, hidden=(1024, 1024), sparsity=0.9, topology="rigl", batch_size=128, decays=True, epochs=12
)

TIME_TO_ACCURACY = Suite(
    name="time-to-accuracy",
    title="Seconds to equal accuracy",
    cases=(
        Case("90%, groups of 32", SETTING, TIMED),
        Case(
            "80%, groups of 32",
            dataclasses.replace(SETTING, sparsity=0.8),
            (
                "dense",
                "sparse layers, static",
                "sparse layers, static, table",
                "sparse layers, RigL by candidates, table",
            ),
        ),
    ),
    table=seconds_to_targets,
    seeds=3,
    smoke_methods=("dense", "sparse layers, RigL, gradient regression"),
    smoke_rewires=True,
    figure_cost="seconds",
)

TIME_TO_ACCURACY_RATES = Suite(
    name="time-to-accuracy-rates",
    title="Rates of the networks whose seconds are compared, on seeds that serve for nothing else",
    cases=(
        Case(
            "95%, groups of 32",
            dataclasses.replace(SETTING, sparsity=0.95, epochs=6),
            tuple(f"{name}, rate {rate:g}" for name in TIMED for rate in RATES),
        ),
    ),
    table=last_accuracies,
    seeds=2,
    smoke_methods=("dense, rate 0.05", "sparse layers, static, rate 0.05"),
)
