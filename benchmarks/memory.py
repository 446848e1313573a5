"""Bytes of optimizer state, and the peak that XLA plans for a step, relative to the parameters.

python benchmarks/memory.py
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro
from networks import mlp_params
from overhead import optimizers
from rich.console import Console
from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure."""

    num_params: int = 5_000_000
    sparsities: tuple[float, ...] = (0.9, 0.95, 0.99)
    output: Path | None = None  # where the JSON goes


def num_bytes(tree: Any) -> int:
    """Of all arrays in a tree, or of their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def step_bytes(tx: optax.GradientTransformationExtraArgs, params: Any, opt_state: Any) -> int | None:
    """Arguments, outputs and temporaries of a donated step less what it updates in place; None where unknown."""

    def step(params: Any, opt_state: Any, grads: Any) -> Any:
        scalar = jnp.ones(())
        updates, opt_state = tx.update(grads, opt_state, params, value=scalar, old_value=scalar, old_grads=grads)
        return optax.apply_updates(params, updates), opt_state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, opt_state, params).compile()
    analysis = compiled.memory_analysis()
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
    params = jax.eval_shape(lambda: mlp_params(config.num_params))
    rows = []
    for sparsity in config.sparsities:
        table = Table(title=f"{config.num_params / 1e6:g}M parameters, {sparsity:.0%} sparse; 1 = the parameters")
        for column in ("optimizer", "state", "peak of a step"):
            table.add_column(column, justify="left" if column == "optimizer" else "right")
        for name, (_, tx) in optimizers(sparsity).items():
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
    if config.output:
        report = {"device": str(jax.devices()[0]), "jax": jax.__version__, "rows": rows}
        config.output.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Config))
