"""Clean and robust accuracy after adversarial training: Tables 1, 2 and 4 of the paper."""

from convergence.setting import Setting
from convergence.suite import Case, Suite
from convergence.tables import clean_and_robust

ADVERSARIAL = Suite(
    name="adversarial",
    title="Adversarial training",
    cases=(
        Case(
            "PGD-5, 99% sparse",
            Setting(attack_epsilon=0.1, attack_steps=5, decays=True),
            (
                "SGD",
                "AGENT as published",
                "gradient regression",
                "gradient regression, γ 0.1",
                "gradient regression, attacked mean",
                "bias-aware regression",
                "SGD, 2x batch",
            ),
        ),
    ),
    table=clean_and_robust,
    seeds=3,
    smoke_methods=("SGD", "gradient regression, attacked mean"),
)
