"""Other implementations beside ours: jaxpruner, and the AGENT authors' PyTorch optimizer.

Neither is needed, and none of their code is here: give the folder of a checkout. jaxpruner runs in the same process,
interleaved with ours and with plain Optax. The authors' optimizer runs in a process of its own, beside torch.optim.SGD
in the same process, with a Python that has torch. Times are those of the optimizer step, gradients given: each is
compared with the plain SGD of its own framework.

    python benchmarks/peers.py --jaxpruner DIR
    python benchmarks/peers.py --reference DIR --reference-python VENV/bin/python
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import statistics
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro
from interleaved import interleaved_seconds, median_ratio, write_report
from networks import batches, loss_fn, mlp_params
from overhead import NEVER, corrections, momentum, optimizer_step, start, train_step
from rich.console import Console
from rich.table import Table

import agent_optax

REFERENCE_SCRIPT = Path(__file__).with_name("peers_torch.py")


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure."""

    jaxpruner: Path | None = None  # a checkout of google-research/jaxpruner
    reference: Path | None = None  # a checkout of the authors' code, with the folder A-ITOP
    reference_python: Path = Path(sys.executable)  # a Python with torch
    num_params: int = 5_000_000
    sparsity: float = 0.9
    rounds: int = 15
    batch_size: int = 128
    output: Path | None = None  # where the JSON goes
    smoke: bool = False  # a tiny network, two rounds: to see that it runs

    def completed(self) -> Config:
        """With the sizes of a smoke test where one is asked for."""
        if not self.smoke:
            return self
        return dataclasses.replace(self, num_params=5000, rounds=2, batch_size=4)


def load_jaxpruner(folder: Path) -> types.ModuleType:
    """The package in a checkout, on the JAX there is.

    It was last changed for a JAX that had `jax.tree_map`; what is missing is set at run time. It imports ml_collections
    for its configuration files, which are not used here.
    """
    if not (folder / "jaxpruner" / "__init__.py").is_file():
        raise FileNotFoundError(
            f"--jaxpruner {folder} holds no jaxpruner/__init__.py: give the root of a checkout of "
            "google-research/jaxpruner."
        )
    if not hasattr(jax, "tree_map"):
        jax.tree_map = former_tree_map
    if not hasattr(optax, "safe_int32_increment"):
        optax.safe_int32_increment = optax.safe_increment
    try:
        importlib.import_module("ml_collections")
    except ImportError:
        sys.modules["ml_collections"] = types.ModuleType("ml_collections")
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("jaxpruner")
    finally:
        sys.path.remove(str(folder))


def former_tree_map(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """As `jax.tree_map` was: None in the first tree stays None, whatever stands there in the others."""
    return jax.tree.map(
        lambda leaf, *others: None if leaf is None else function(leaf, *others),
        tree,
        *rest,
        is_leaf=lambda node: node is None,
    )


class Pruner:
    """A jaxpruner algorithm around momentum SGD, and the hook that it needs after the update."""

    def __init__(self, updater: Any):
        self.updater = updater
        self.tx = updater.wrap_optax(momentum())

    def init(self, params: Any) -> Any:
        """The wrapped state."""
        return self.tx.init(params)

    def step(self, grads: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
        """The new parameters and the new state."""
        updates, opt_state = self.tx.update(grads, opt_state, params)
        return self.masked(optax.apply_updates(params, updates), opt_state), opt_state

    def masked(self, params: Any, opt_state: Any) -> Any:
        """The hook after `optax.apply_updates`."""
        return self.updater.post_gradient_update(params, opt_state)


def pruner_cases(jaxpruner: types.ModuleType, config: Config, every: int) -> dict[str, Pruner]:
    """Its static, SET and RigL; the latter also without leaving out the optimizer step at a topology update."""
    distribution = functools.partial(
        jaxpruner.sparsity_distributions.erk,
        sparsity=config.sparsity,
        filter_fn=lambda name, param: name[-1] == "kernel",
    )
    schedule = jaxpruner.PeriodicSchedule(update_freq=every, update_start_step=1, update_end_step=None)

    def make(algorithm: Any, **options: Any) -> Pruner:
        return Pruner(algorithm(sparsity_distribution_fn=distribution, scheduler=schedule, **options))

    return {
        "jaxpruner, static": Pruner(jaxpruner.StaticRandomSparse(sparsity_distribution_fn=distribution)),
        "jaxpruner, SET": make(jaxpruner.SET),
        "jaxpruner, RigL": make(jaxpruner.RigL),
        "jaxpruner, RigL, skip_gradients=False": make(jaxpruner.RigL, skip_gradients=False),
    }


def pruner_step(pruner: Pruner, params: Any, batch: Any | None) -> Callable[[], Any]:
    """One donated optimizer step with fixed gradients, or one train step if there is a batch."""
    grads = jax.tree.map(lambda p: 1e-3 * jax.random.normal(jax.random.key(2), p.shape), params)

    @jax.jit
    def init(params: Any) -> Any:
        opt_state = pruner.init(params)
        return jax.tree.map(jnp.copy, (pruner.masked(params, opt_state), opt_state))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, opt_state: Any, grads: Any, batch: Any) -> Any:
        if batch is not None:
            grads = jax.grad(loss_fn)(params, batch)
        return pruner.step(grads, opt_state, params)

    held = list(init(params))

    def run() -> Any:
        held[:] = step(*held, grads, batch)
        return held

    return run


def our_cases(config: Config, every: int) -> dict[str, Any]:
    """Ours, in both storages."""
    cases = {"sgd": momentum()}
    for storage in ("dense", "compact"):
        sparse = functools.partial(agent_optax.sparsify, momentum(), sparsity=config.sparsity, storage=storage)
        if every == NEVER:
            cases[f"ours, static, {storage}"] = sparse(agent_optax.static())
        cases[f"ours, SET, {storage}"] = sparse(agent_optax.set_(update_every=every))
        cases[f"ours, RigL, {storage}"] = sparse(agent_optax.rigl(update_every=every))
    return cases


def beside_jaxpruner(config: Config) -> list[dict[str, Any]]:
    """Rows of an ordinary step, of a whole train step, and of a step at which the topology changes."""
    jaxpruner = load_jaxpruner(config.jaxpruner)
    params = mlp_params(config.num_params)
    batch = jax.tree.map(lambda x: x[0], batches(1, config.batch_size))
    rows, begins = [], {}
    for stage, every in (("optimizer step", NEVER), ("train step", NEVER), ("topology update", 1)):
        data = batch if stage == "train step" else None
        make = functools.partial(train_step, batch=batch) if stage == "train step" else optimizer_step
        ours = our_cases(config, every)
        begins = {name: begins.get(name) or start(tx, params) for name, tx in ours.items()}  # the same at any interval
        steps = {name: make(tx, begins[name]) for name, tx in ours.items()}
        theirs = pruner_cases(jaxpruner, config, every)
        if stage == "topology update":
            del theirs["jaxpruner, static"]
        steps |= {name: pruner_step(pruner, params, data) for name, pruner in theirs.items()}
        rounds = config.rounds if stage == "optimizer step" else max(config.rounds // 5, 2)
        seconds = interleaved_seconds(steps, rounds, warmup=2)
        rows += [
            {
                "stage": stage,
                "implementation": name,
                "ms": 1e3 * statistics.median(seconds[name]),
                "ratio": median_ratio(seconds, name, "sgd"),
            }
            for name in steps
        ]
    return rows


def beside_reference(config: Config) -> list[dict[str, Any]]:
    """Rows of the authors' optimizer, against torch's SGD; and of ours, against Optax's."""
    if not (config.reference / "A-ITOP" / "sparselearning" / "train_helper.py").is_file():
        raise FileNotFoundError(
            f"--reference {config.reference} holds no A-ITOP/sparselearning/train_helper.py: give the root of a "
            "checkout of StevenBoys/AGENT."
        )
    sizes = [[int(n) for n in layer["kernel"].shape] for layer in mlp_params(config.num_params).values()]
    request = {"folder": str(config.reference), "sizes": sizes, "density": 1 - config.sparsity, "rounds": config.rounds}
    command = [str(config.reference_python), str(REFERENCE_SCRIPT), json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"--reference-python {config.reference_python} could not measure the authors' optimizer: give a Python "
            f"that can import torch and numpy. It said:\n{done.stderr.strip()[-2000:]}"
        )
    theirs = json.loads(done.stdout.splitlines()[-1])
    params = mlp_params(config.num_params)
    ours: dict[str, Any] = {"sgd": momentum(), "ours, AGENT": corrections()["AGENT"]}
    for storage in ("dense", "compact"):
        for name, every in (("", NEVER), (", topology update", 1)):
            ours[f"ours, AGENT on RigL, {storage}{name}"] = agent_optax.sparsify(
                corrections()["AGENT"], agent_optax.rigl(update_every=every), sparsity=config.sparsity, storage=storage
            )
    seconds = interleaved_seconds(
        {name: optimizer_step(tx, start(tx, params)) for name, tx in ours.items()}, config.rounds
    )
    measured = {"optax": (seconds, "sgd"), "torch": (theirs["seconds"], "torch.optim.SGD")}
    return [
        {
            "stage": f"optimizer step, {framework}",
            "implementation": name,
            "ms": 1e3 * statistics.median(seconds[name]),
            "ratio": median_ratio(seconds, name, baseline),
        }
        for framework, (seconds, baseline) in measured.items()
        for name in seconds
    ]


def main(config: Config) -> None:
    """Prints a table; writes JSON."""
    config = config.completed()
    if config.jaxpruner is None and config.reference is None:
        raise ValueError("nothing to measure: give --jaxpruner DIR, --reference DIR or both, folders of checkouts.")
    rows = []
    if config.jaxpruner is not None:
        rows += beside_jaxpruner(config)
    if config.reference is not None:
        rows += beside_reference(config)
    title = f"{config.num_params / 1e6:g}M parameters, {config.sparsity:.0%} sparse, {jax.devices()[0].device_kind}"
    table = Table(title=title)
    for column in ("step", "implementation", "ms", "ratio to plain SGD"):
        table.add_column(column, justify="left" if column in ("step", "implementation") else "right")
    for row in rows:
        table.add_row(row["stage"], row["implementation"], f"{row['ms']:.2f}", f"{row['ratio']:.2f}")
    Console(width=120).print(table)
    write_report(config.output, config, rows)


if __name__ == "__main__":
    main(tyro.cli(Config))
