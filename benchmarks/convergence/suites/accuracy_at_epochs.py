"""Test accuracy at equal epochs for two topologies and four sparsities: Tables 1 and 2 of the paper."""

from convergence.setting import Setting
from convergence.suite import Case, Suite
from convergence.tables import at_epochs

METHODS = ("SGD", "AGENT as published", "gradient regression")
CASES = {
    (topology, sparsity): Case(
        f"{label}-ITOP, {sparsity:.0%}", Setting(topology=topology, sparsity=sparsity, decays=True), METHODS
    )
    for topology, label in (("rigl", "RigL"), ("set", "SET"))
    for sparsity in (0.99, 0.9, 0.95, 0.8)
}

ACCURACY_AT_EPOCHS = Suite(
    name="accuracy-at-epochs",
    title="Accuracy at equal epochs",
    cases=tuple(CASES.values()),
    table=at_epochs,
    seeds=3,
    smoke_methods=("SGD", "gradient regression"),
)
