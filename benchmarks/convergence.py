"""Accuracy of corrected gradients against other methods, in suites that follow the tables and figures of the paper.

    python benchmarks/convergence.py --suite r9                # the main table, about four minutes on two cores
    python benchmarks/convergence.py --suite ablations --seeds 4
    python benchmarks/convergence.py --suite all --smoke       # that everything runs, in seconds

Each suite writes its curves (CSV), tables (Markdown) and figure (PNG) to benchmarks/results, and prints the tables.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path

import rich.console
import tyro
from convergence import images, report, workers
from convergence.suite import Suite, smoke_sized
from convergence.suites import SUITES
from convergence.training import Run

RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Config:
    """What to run."""

    suite: str = "r9"
    """A name, or "all"."""
    seeds: int | None = None
    """How many; each suite has its own default."""
    first_seed: int = 0
    dataset: str | None = None
    """Default: fashion_mnist where it is installed, else digits."""
    methods: tuple[str, ...] = ()
    """Only these, with the baseline of each case. Default: all."""
    cases: tuple[str, ...] = ()
    """Only these. Default: all."""
    workers: int = 2
    """Processes, each on a core of its own; 0 for none."""
    output: Path = RESULTS
    keep: Path | None = None
    """A folder of finished runs: what is there is not run again, by any suite; remove it when the code changes."""
    from_csv: bool = False
    """Make tables and figures of the CSV that is there; run nothing."""
    smoke: bool = False
    """Two seeds, two epochs, a tiny network, in this process."""


def main(config: Config) -> None:
    """Runs suites, writes their files, prints their tables."""
    names = list(SUITES) if config.suite == "all" else [config.suite]
    unknown = [name for name in names if name not in SUITES]
    if unknown:
        sys.exit(f"--suite must be one of {', '.join(SUITES)}, all; got {unknown[0]!r}")
    if config.seeds is not None and config.seeds < 2:
        sys.exit(f"--seeds {config.seeds}: an interval needs two seeds or more")
    dataset = config.dataset or images.available()
    console = rich.console.Console(width=200, soft_wrap=True)
    if dataset == "digits" and config.dataset is None:
        console.print("Fashion-MNIST is not installed (apt-get install dataset-fashion-mnist): digits in its place.")
    for name in names:
        run_suite(_fitted(SUITES[name], config, dataset), config, console)


def _fitted(suite: Suite, config: Config, dataset: str) -> Suite:
    if config.smoke:
        return smoke_sized(suite, dataset)
    cases = [
        dataclasses.replace(
            case,
            setting=dataclasses.replace(case.setting, dataset=dataset),
            methods=tuple(m for i, m in enumerate(case.methods) if i == 0 or not config.methods or m in config.methods),
        )
        for case in suite.cases
        if not config.cases or case.name in config.cases
    ]
    if not cases:
        sys.exit(f"--cases must name some of: {', '.join(case.name for case in suite.cases)}")
    return dataclasses.replace(suite, cases=tuple(cases), seeds=config.seeds or suite.seeds)


def run_suite(suite: Suite, config: Config, console: rich.console.Console) -> None:
    """One suite, from runs to files."""
    path = config.output / f"{suite.name}.csv"
    start = time.perf_counter()
    if config.from_csv:
        results, seeds = report.read_csv(path)
        suite = _as_run(suite, results)
    else:
        seeds = tuple(range(config.first_seed, config.first_seed + suite.seeds))
        jobs = {
            (case.name, method): workers.Job(method, case.setting, seeds)
            for case in suite.cases
            for method in case.methods
        }

        def on_done(job: workers.Job) -> None:
            console.print(f"{time.perf_counter() - start:6.0f} s  {suite.name}: {job.method}", style="dim")

        runs = workers.run_all(jobs.values(), 0 if config.smoke else config.workers, on_done, config.keep)
        results = {case.name: {m: runs[jobs[case.name, m]] for m in case.methods} for case in suite.cases}
        report.write_csv(path, results, seeds)
    text = report.markdown(suite, results, seeds, _command(suite, config, seeds))
    path.with_suffix(".md").write_text(text)
    report.plot(suite, results, path.with_suffix(".png"))
    console.print(text, markup=False)
    console.print(f"{time.perf_counter() - start:.0f} s. Files: {path.with_suffix('')}.csv, .md, .png")


def _as_run(suite: Suite, results: dict[str, dict[str, list[Run]]]) -> Suite:
    """The suite with the cases and methods that there are results of."""
    cases = [
        dataclasses.replace(case, methods=tuple(m for m in case.methods if m in results[case.name]))
        for case in suite.cases
        if case.name in results
    ]
    return dataclasses.replace(suite, cases=tuple(cases))


def _command(suite: Suite, config: Config, seeds: tuple[int, ...]) -> str:
    """What to type for these results."""
    words = ["python benchmarks/convergence.py", f"--suite {suite.name}"]
    if config.smoke:
        return " ".join([*words, "--smoke"])
    words.append(f"--seeds {len(seeds)}")
    if seeds[0]:
        words.append(f"--first-seed {seeds[0]}")
    if len(suite.cases) < len(SUITES[suite.name].cases):
        words.append("--cases " + " ".join(f'"{case.name}"' for case in suite.cases))
    run = {case.name: case.methods for case in suite.cases}
    if any(len(run[case.name]) < len(case.methods) for case in SUITES[suite.name].cases if case.name in run):
        chosen = dict.fromkeys(m for case in suite.cases for m in case.methods)
        words.append("--methods " + " ".join(f'"{method}"' for method in chosen))
    return " ".join(words)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
