"""How gradients scatter as sparsity grows, and what a correction leaves: Figure 1, Tables 9 and 11 of the paper."""

from convergence.setting import Setting
from convergence.suite import Case, Suite
from convergence.tables import gradients

VARIANCE_AND_CORRELATION = Suite(
    name="variance-and-correlation",
    title="Gradient variance and correlation",
    cases=tuple(
        Case(
            f"{sparsity:.0%} sparse",
            Setting(sparsity=sparsity, topology="rigl" if sparsity else "static", epochs=6, probes=True),
            ("gradient regression",),
        )
        for sparsity in (0.99, 0.95, 0.9, 0.8, 0.5, 0.0)
    ),
    table=gradients,
    seeds=2,
)
