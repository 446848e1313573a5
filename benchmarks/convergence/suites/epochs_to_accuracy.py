"""Epochs to equal accuracy: Figure 4 of the paper."""

from convergence.suite import Suite
from convergence.suites.accuracy_at_epochs import CASES
from convergence.tables import to_targets

EPOCHS_TO_ACCURACY = Suite(
    name="epochs-to-accuracy",
    title="Epochs to equal accuracy",
    cases=tuple(CASES[topology, sparsity] for sparsity in (0.99, 0.9) for topology in ("set", "rigl")),
    table=to_targets,
    seeds=3,
    smoke_methods=("SGD", "gradient regression"),
)
