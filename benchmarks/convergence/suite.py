"""What a suite is: cases, each a setting with methods that are compared in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np

from convergence.setting import Setting
from convergence.training import PROBES, Run


@dataclasses.dataclass(frozen=True)
class Case:
    """Methods in one setting."""

    name: str
    setting: Setting
    methods: tuple[str, ...]  # names in METHODS; the first is the baseline


@dataclasses.dataclass(frozen=True)
class Suite:
    """A table and a figure."""

    name: str
    title: str
    cases: tuple[Case, ...]
    table: Callable[[Case, dict[str, Curves]], list[list[str]]]  # rows of a case, the first one the heading
    seeds: int = 6
    smoke_methods: tuple[str, ...] = ()  # of the first case; by default its first two
    smoke_rewires: bool = False
    figure_cost: Literal["evaluations", "seconds"] = "evaluations"  # on the axis of the figure's second panel


class Curves:
    """All seeds of one method in one setting, by seed and epoch [S, E]."""

    def __init__(self, runs: list[Run]):
        self.accuracy = np.stack([run.accuracy for run in runs])
        self.average_accuracy = np.stack([run.average_accuracy for run in runs])
        self.correlation = np.stack([run.correlation for run in runs])
        self.variance_ratio = np.stack([run.variance_ratio for run in runs])
        self.evaluations = np.mean([run.evaluations for run in runs], axis=0)  # [E]
        self.seconds = np.mean([run.seconds for run in runs], axis=0)  # [E]
        probes = [run.probes for run in runs if run.probes is not None]
        self.probes = dict(zip(PROBES, np.moveaxis(np.stack(probes), -1, 0), strict=True)) if probes else {}
        self.robust_accuracy = np.array([run.robust_accuracy for run in runs])  # [S]


def smoke_sized(suite: Suite, dataset: str) -> Suite:
    """The first case with its smoke methods, few images, one small layer, two epochs, two seeds.

    Most time goes into compiling: suites share what they can, and only `smoke_rewires` compiles a topology update.
    """
    case = suite.cases[0]
    setting = Setting(
        dataset=dataset,
        num_train=320,
        num_test=200,
        hidden=(16,),
        sparsity=0.8,
        topology=case.setting.topology if suite.smoke_rewires else "static",
        epochs=2,
        attack_epsilon=case.setting.attack_epsilon,
        attack_steps=2,
        averages=True,
        probes=case.setting.probes,
    )
    methods = suite.smoke_methods or case.methods[:2]
    case = dataclasses.replace(case, setting=setting, methods=methods)
    return dataclasses.replace(suite, cases=(case,), seeds=2)
