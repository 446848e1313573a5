"""Runs spread over processes, each on a core of its own."""

from __future__ import annotations

import concurrent.futures
import hashlib
import multiprocessing
import os
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from convergence.methods import METHODS
from convergence.setting import Setting
from convergence.training import Run, train


class Job(NamedTuple):
    """One method in one setting, from all seeds."""

    method: str
    setting: Setting
    seeds: tuple[int, ...]

    def cost(self) -> float:
        """Roughly in gradient evaluations of single samples; compiling costs as much as some epochs."""
        num_images = self.setting.num_train or 60_000
        epochs = METHODS[self.method].evaluations(self.setting) * self.setting.epochs * len(self.seeds)
        return (epochs + 60) * num_images


class Kept:
    """Runs of earlier calls in a folder, one file a seed: a suite takes what another has run."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def file(self, job: Job, seed: int) -> Path:
        name = repr((job.method, job.setting, seed))
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.pickle"

    def get(self, job: Job) -> dict[int, Run]:
        return {s: pickle.loads(self.file(job, s).read_bytes()) for s in job.seeds if self.file(job, s).is_file()}

    def put(self, job: Job, runs: list[Run]) -> None:
        for seed, run in zip(job.seeds, runs, strict=True):
            self.file(job, seed).write_bytes(pickle.dumps(run))


def run_all(
    jobs: Iterable[Job], workers: int, on_done: Callable[[Job], None], keep: Path | None = None
) -> dict[Job, list[Run]]:
    """The runs of each job. `workers` = 0: in this process. `keep`: a folder of runs to take from and add to."""
    kept = Kept(keep) if keep is not None else None
    by_seed = {job: kept.get(job) if kept is not None else {} for job in jobs}
    todo = [job._replace(seeds=tuple(s for s in job.seeds if s not in runs)) for job, runs in by_seed.items()]
    todo = [job for job in todo if job.seeds]
    done: dict[tuple[str, Setting], dict[int, Run]] = {}

    def finish(job: Job, runs: list[Run]) -> None:
        done.setdefault(job[:2], {}).update(zip(job.seeds, runs, strict=True))
        if kept is not None:
            kept.put(job, runs)
        on_done(job)

    todo.sort(key=Job.cost, reverse=True)  # the longest first: the last to finish should be a short one
    if workers:
        _run_in_processes(todo, workers, finish)
    else:
        for job in todo:
            finish(job, train(*job))
    return {job: [(done.get(job[:2], {}) | runs)[s] for s in job.seeds] for job, runs in by_seed.items()}


def _run_in_processes(todo: list[Job], workers: int, finish: Callable[[Job, list[Run]], None]) -> None:
    context = multiprocessing.get_context("spawn")
    cores = context.SimpleQueue()
    available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    for i in range(workers):
        cores.put(available[i % len(available)] if available else None)
    # One thread a process: two processes with a core each leave no core waiting, as threads of small products would.
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false --xla_cpu_parallel_codegen_split_count=1"
    )
    with concurrent.futures.ProcessPoolExecutor(workers, context, initializer=_take_core, initargs=(cores,)) as pool:
        pending = {pool.submit(train, *job): job for job in todo}
        for future in concurrent.futures.as_completed(pending):
            finish(pending[future], future.result())


def _take_core(cores: multiprocessing.SimpleQueue) -> None:
    core = cores.get()
    if core is not None:
        os.sched_setaffinity(0, {core})
