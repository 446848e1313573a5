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

    def file(self, folder: Path) -> Path:
        """Where the result is kept for another suite that wants the same."""
        digest = hashlib.sha256(repr((self, METHODS[self.method].evaluations(self.setting))).encode()).hexdigest()
        return folder / f"{digest[:24]}.pickle"


def run_all(
    jobs: Iterable[Job], workers: int, on_done: Callable[[Job], None], keep: Path | None = None
) -> dict[Job, list[Run]]:
    """The runs of each job. `workers` = 0: in this process. `keep`: a folder of results to take from and add to."""
    results: dict[Job, list[Run]] = {}
    todo = []
    for job in dict.fromkeys(jobs):
        if keep is not None and job.file(keep).is_file():
            results[job] = pickle.loads(job.file(keep).read_bytes())
            on_done(job)
        else:
            todo.append(job)

    def finish(job: Job, runs: list[Run]) -> None:
        results[job] = runs
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            job.file(keep).write_bytes(pickle.dumps(runs))
        on_done(job)

    todo.sort(key=Job.cost, reverse=True)  # the longest first: the last to finish should be a short one
    if not workers:
        for job in todo:
            finish(job, train(*job))
        return results
    cores = multiprocessing.get_context("spawn").SimpleQueue()
    available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    for i in range(workers):
        cores.put(available[i % len(available)] if available else None)
    # One thread a process: two processes with a core each leave no core waiting, as threads of small products would.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_take_core, initargs=(cores,)
    )
    with pool:
        pending = {pool.submit(train, *job): job for job in todo}
        for future in concurrent.futures.as_completed(pending):
            finish(pending[future], future.result())
    return results


def _take_core(cores: multiprocessing.SimpleQueue) -> None:
    core = cores.get()
    if core is not None:
        os.sched_setaffinity(0, {core})
