"""Trains a network whose dense form would not fit into memory, topology updates included.

Four sparse layers of 32,768 x 32,768 at 99.9%, SGD with momentum and RigL, on made-up data:

    python examples/larger_than_memory.py
    python examples/larger_than_memory.py --candidates None
    python examples/larger_than_memory.py --width 4096 --num-steps 30 --update-every 10
"""

from __future__ import annotations

import dataclasses
import resource
import sys
import time

import jax
import jax.numpy as jnp
import optax
import tyro
from flax import nnx

import agent_optax
import agent_optax.flax


@dataclasses.dataclass(frozen=True)
class Config:
    """What to train."""

    width: int = 32_768
    num_layers: int = 4
    sparsity: float = 0.999
    group: int = 16  # outputs that share their inputs
    batch: int = 32
    num_steps: int = 20
    update_every: int = 15  # steps between topology updates
    candidates: float | None = 1.0  # weights that may grow, over those that exist; None: all, by the dense gradient
    max_bytes: int = 2**28  # of the dense gradient, which exists in a topology update alone, a part at a time
    seed: int = 0


class Network(nnx.Module):
    """Sparse layers with residual connections."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.layers = nnx.List(
            agent_optax.flax.nnx.SparseLinear(
                config.width, config.width, sparsity=config.sparsity, group=config.group, rngs=rngs
            )
            for _ in range(config.num_layers)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, width] -> [batch, width]."""
        for layer in self.layers:
            x = x + jnp.tanh(layer(x))
        return x


def loss_fn(model: Network, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Mean squared error."""
    x, y = batch
    return jnp.mean((model(x) - y) ** 2)


@nnx.jit
def step(model: Network, optimizer: nnx.Optimizer, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """One step."""
    value, grads = nnx.value_and_grad(loss_fn)(model, batch)
    optimizer.update(model, grads)
    return value


def main(config: Config) -> None:
    """Prints the loss, and what dense and sparse training take."""
    num_weights = config.num_layers * config.width**2
    dense_bytes = 4 * 3 * num_weights  # float32 weights, gradients and momentum
    started = time.perf_counter()
    model = Network(config, nnx.Rngs(config.seed))
    optimizer = nnx.Optimizer(model, optax.sgd(0.02 * config.width, momentum=0.9), wrt=nnx.Param)
    topology = agent_optax.rigl(update_every=config.update_every)
    num_values = sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
    print(f"{num_weights:,} weights in dense layers, {num_values:,} parameters in sparse ones", flush=True)

    batches = jax.random.normal(jax.random.key(config.seed + 1), (4, config.batch, config.width))
    targets = jnp.roll(jnp.sin(2 * batches), 1, axis=-1)
    for t in range(config.num_steps):
        batch = (batches[t % 4], targets[t % 4])
        value = step(model, optimizer, batch)
        if t % 5 == 0 or t + 1 == config.num_steps:
            print(f"step {t:3d}  loss {value:.4f}  {time.perf_counter() - started:5.1f} s", flush=True)
        if topology.is_due(t + 1):
            num_grown, _ = agent_optax.flax.nnx.rewire(
                loss_fn, model, optimizer, batch, topology=topology, step=t + 1, key=jax.random.key(t),
                candidates=config.candidates, max_bytes=config.max_bytes,
            )  # fmt: skip
            print(f"step {t:3d}  {num_grown:,} weights grown  {time.perf_counter() - started:5.1f} s", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"dense training would take {dense_bytes / 1e9:.1f} GB, this took {peak / 1e9:.2f} GB at its peak")


if __name__ == "__main__":
    main(tyro.cli(Config))
