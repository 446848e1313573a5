"""Bytes of optimizer state, and the peak that XLA plans for an optimizer step, relative to the parameters.

Nothing is run: shapes tell the one, the compiler the other. `table` and the cached snapshot keep a gradient of each
batch, here of as many as overhead.py has.

    python benchmarks/memory.py
    python benchmarks/memory.py --sparsities 0.99 --select table
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro
from interleaved import write_report
from networks import mlp_params
from overhead import NUM_BATCHES, selected
from rich.console import Console
from rich.table import Table

from agent_optax.typing import MemoryState


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure."""

    num_params: int = 5_000_000
    sparsities: tuple[float, ...] = (0.9, 0.95, 0.99)
    select: tuple[str, ...] = ()  # only optimizers whose name holds one of these, and their baselines
    output: Path | None = None  # where the JSON goes
    smoke: bool = False  # one tiny network, few optimizers: to see that it runs

    def completed(self) -> Config:
        """With the sizes of a smoke test where one is asked for."""
        if not self.smoke:
            return self
        select = self.select or ("RigL, sgd, dense", "RigL, sgd, compact", "table, no sparsity")
        return dataclasses.replace(self, num_params=5000, sparsities=(0.99,), select=select)


def num_bytes(tree: Any) -> int:
    """Of all arrays in a tree, or of their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def needs_old_grads(opt_state: Any) -> bool:
    """Whether a memory in the state wants a second gradient, which is an argument of the step like the first."""

    def is_memory(node: Any) -> bool:
        return isinstance(node, MemoryState)

    memories = [node for node in jax.tree.leaves(opt_state, is_leaf=is_memory) if is_memory(node)]
    return any(memory.evaluation_point() is not None for memory in memories)


def step_bytes(tx: optax.GradientTransformationExtraArgs, params: Any, opt_state: Any) -> int | None:
    """Arguments, outputs and temporaries of a donated step less what it updates in place; None where unknown."""

    def step(params: Any, opt_state: Any, grads: Any, extras: Any) -> Any:
        updates, opt_state = tx.update(grads, opt_state, params, **extras)
        return optax.apply_updates(params, updates), opt_state

    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    extras = {"value": scalar, "old_value": scalar, "batch_index": jax.ShapeDtypeStruct((), jnp.int32)}
    if needs_old_grads(opt_state):
        extras["old_grads"] = params
    analysis = jax.jit(step, donate_argnums=(0, 1)).lower(params, opt_state, params, extras).compile().memory_analysis()
    if analysis is None:
        return None
    return (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        + analysis.temp_size_in_bytes
        - analysis.alias_size_in_bytes
    )


def main(config: Config) -> None:
    """Prints a table for each sparsity; writes JSON."""
    config = config.completed()
    params = jax.eval_shape(lambda: mlp_params(config.num_params))
    rows = []
    for sparsity in config.sparsities:
        size = f"{config.num_params / 1e6:g}M parameters, {sparsity:.0%} sparse, {NUM_BATCHES} batches"
        table = Table(title=f"{size}; 1 = the bytes of the parameters")
        for column in ("optimizer", "state", "peak of a step"):
            table.add_column(column, justify="left" if column == "optimizer" else "right")
        for name, (_, tx) in selected(config, sparsity).items():
            opt_state = jax.eval_shape(tx.init, params)
            peak = step_bytes(tx, params, opt_state)
            row = {
                "sparsity": sparsity,
                "optimizer": name,
                "state": num_bytes(opt_state) / num_bytes(params),
                "peak": None if peak is None else peak / num_bytes(params),
            }
            rows.append(row)
            table.add_row(name, f"{row['state']:.3f}", "?" if row["peak"] is None else f"{row['peak']:.2f}")
        Console(width=120).print(table)
    write_report(config.output, config, rows)


if __name__ == "__main__":
    main(tyro.cli(Config))
