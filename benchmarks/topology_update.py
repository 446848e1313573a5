"""What one topology update costs, against the sort that other libraries pay.

python benchmarks/topology_update.py
"""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import tyro
from interleaved import interleaved_seconds, median_ratio, write_report
from networks import mlp_params
from rich.console import Console
from rich.table import Table

import agent_optax


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure."""

    num_params: int = 5_000_000
    sparsity: float = 0.9
    drop_fraction: float = 0.3
    storages: tuple[Literal["dense", "compact"], ...] = ("dense", "compact")
    rounds: int = 5
    output: Path | None = None  # where the JSON goes
    smoke: bool = False  # a tiny network, one round: to see that it runs

    def completed(self) -> Config:
        """With the sizes of a smoke test where one is asked for."""
        if not self.smoke:
            return self
        return dataclasses.replace(self, num_params=5000, storages=("compact",), rounds=1)


def sorted_mask(scores: jax.Array, k: int) -> jax.Array:
    """The k largest by a full argsort of the layer."""
    flat = scores.reshape(-1)
    order = jnp.argsort(-flat)
    return jnp.zeros(flat.shape, bool).at[order[:k]].set(True).reshape(scores.shape)


def top_k_of_jax(scores: jax.Array, k: int) -> jax.Array:
    """The k largest by jax.lax.top_k."""
    flat = scores.reshape(-1)
    return jnp.zeros(flat.shape, bool).at[jax.lax.top_k(flat, k)[1]].set(True).reshape(scores.shape)


SELECTIONS = {"bisection (ours)": agent_optax.top_k_mask, "lax.top_k": top_k_of_jax, "argsort": sorted_mask}


PATTERNS = {"constant fan-in": agent_optax.fan_in(), "fan-in of 16 together": agent_optax.fan_in(group=16)}


def rigl_with(select: Any, config: Config) -> Any:
    """A RigL update of all layers with this selection, for a timing of the selection alone."""

    def rewire(params: Any, masks: Any, grads: Any) -> Any:
        def layer(w: jax.Array, mask: jax.Array, g: jax.Array) -> jax.Array:
            active = round((1 - config.sparsity) * w.size)
            dropped = round(config.drop_fraction * active)
            kept = select(jnp.where(mask, jnp.abs(w), -1.0), active - dropped)
            return kept | select(jnp.where(kept, -1.0, jnp.abs(g)), dropped)

        return jax.tree.map(layer, params, masks, grads)

    return jax.jit(rewire)


def whole_step(topology: Any, storage: str, params: Any, grads: Any, config: Config, pattern: Any = None) -> Any:
    """A closure that takes one optimizer step at which this topology is due."""
    tx = agent_optax.sparsify(
        optax.sgd(0.1, momentum=0.9), topology, sparsity=config.sparsity, storage=storage, pattern=pattern
    )
    opt_state = tx.init(params)
    start = agent_optax.mask_params(params, opt_state)
    step = jax.jit(lambda params, opt_state, grads: tx.update(grads, opt_state, params))
    return lambda: step(start, opt_state, grads)


def main(config: Config) -> None:
    """Prints two tables: selection alone, and whole optimizer steps with a topology update; writes JSON."""
    config = config.completed()
    params = {name: layer["kernel"] for name, layer in mlp_params(config.num_params).items()}
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(1), p.shape), params)
    masks = jax.tree.map(lambda p: jax.random.uniform(jax.random.key(2), p.shape) > config.sparsity, params)
    selections = {name: rigl_with(select, config) for name, select in SELECTIONS.items()}
    steps: dict[str, Any] = {
        name: (lambda rewire=rewire: rewire(params, masks, grads)) for name, rewire in selections.items()
    }
    for storage in config.storages:
        steps[f"step with SET update, {storage}"] = whole_step(agent_optax.set_(1), storage, params, grads, config)
        steps[f"step with RigL update, {storage}"] = whole_step(agent_optax.rigl(1), storage, params, grads, config)
        for name, pattern in PATTERNS.items():
            steps[f"the same with {name}, {storage}"] = whole_step(
                agent_optax.rigl(1), storage, params, grads, config, pattern
            )
    seconds = interleaved_seconds(steps, config.rounds, warmup=1)
    rows = [
        {
            "step": name,
            "ms": 1e3 * statistics.median(seconds[name]),
            "argsort_over_this": 1 / median_ratio(seconds, name, "argsort"),
        }
        for name in steps
    ]
    title = f"{config.num_params / 1e6:g}M parameters, {config.sparsity:.0%} sparse, {jax.devices()[0].device_kind}"
    table = Table(title=title)
    for column in ("step", "ms", "times faster than argsort"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for row in rows:
        table.add_row(row["step"], f"{row['ms']:.1f}", f"{row['argsort_over_this']:.1f}")
    Console(width=120).print(table)
    write_report(config.output, config, rows)


if __name__ == "__main__":
    main(tyro.cli(Config))
