"""What sparse layers cost over dense forms: train steps and topology updates of a perceptron, products, convolutions.

All are timed side by side in one process; the dense network runs under the same plain optimizer, without masks.

    python benchmarks/sparse_layers.py
    python benchmarks/sparse_layers.py --stages mlp --width 8192 --batch 64 --layers fan_in:16 --sparsities 0.99
    python benchmarks/sparse_layers.py --stages conv --sparsities 0.95 0.99
    python benchmarks/sparse_layers.py --stages forward --layers fan_in:32 any_mask
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import tyro
from interleaved import interleaved_seconds, median_ratio, write_report
from networks import NUM_CLASSES, NUM_INPUTS, batches
from rich.console import Console
from rich.table import Table

import agent_optax
from agent_optax import export, layers

Dot = Callable[[int, jax.Array, Any], jax.Array]  # number of the layer, x, weights -> y


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure."""

    stages: tuple[Literal["mlp", "rewire", "conv", "forward"], ...] = ("mlp", "rewire", "conv", "forward")
    layers: tuple[str, ...] = ("fan_in:32", "fan_in:16", "fan_in:8", "fan_in:1", "any_mask")
    sparsities: tuple[float, ...] = (0.9, 0.95, 0.99)
    width: int = 2048
    num_hidden: int = 2
    batch: int = 128
    momentum: float = 0.0  # of SGD, Nesterov's
    candidates: float = 1.0  # of topology updates that draw them, over the number of weights
    channels: int = 256
    size: int = 7  # height and width
    conv_batch: int = 128
    rounds: int = 15
    output: Path | None = None  # where the JSON goes
    smoke: bool = False  # tiny layers, one round: to see that it runs

    def completed(self) -> Config:
        """With the sizes of a smoke test where one is asked for."""
        if not self.smoke:
            return self
        tiny = {"width": 16, "batch": 4, "channels": 16, "size": 4, "conv_batch": 2, "rounds": 1, "sparsities": (0.9,)}
        kinds = self.layers if len(self.layers) < 3 else ("fan_in:8", "any_mask")
        return dataclasses.replace(self, layers=kinds, **tiny)


def connect(kind: str, key: jax.Array, inputs: int, outputs: int, sparsity: float) -> layers.Connections:
    """Connections of a kind, "fan_in:GROUP" or "any_mask"."""
    name, _, group = kind.partition(":")
    if name == "any_mask":
        return layers.AnyMask.random(key, inputs=inputs, outputs=outputs, density=1 - sparsity)
    if name == "fan_in" and group.isdigit():
        return layers.FanIn.random(key, inputs=inputs, outputs=outputs, density=1 - sparsity, group=int(group))
    raise ValueError(f'layers must be "fan_in:GROUP" or "any_mask", got {kind!r}.')


def loss_fn(params: Any, batch: Any, dot: Dot) -> jax.Array:
    """Cross-entropy of the network; its first layer needs no gradient to x."""
    x, labels = batch
    for i, (w, b) in enumerate(zip(params["hidden"], params["biases"], strict=True)):
        x = jax.nn.relu(dot(i, x, w) + b)
    return optax.softmax_cross_entropy_with_integer_labels(x @ params["output"], labels).mean()


def start(weights: list[jax.Array], config: Config) -> tuple[Any, Any, optax.GradientTransformation]:
    """Parameters with these hidden weights, a batch and an optimizer."""
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "hidden": weights,
        "biases": [jnp.zeros(config.width) for _ in weights],
        "output": jax.random.normal(keys[0], (config.width, NUM_CLASSES)) / jnp.sqrt(config.width),
    }
    batch = jax.tree.map(lambda a: a[0], batches(1, config.batch))
    return params, batch, optax.sgd(0.01, momentum=config.momentum or None, nesterov=bool(config.momentum))


def train_step(dot: Dot, weights: list[jax.Array], config: Config) -> Callable[[], Any]:
    """A closure that takes one step of a network with these hidden weights."""
    params, batch, tx = start(weights, config)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, opt_state: Any) -> Any:
        updates, opt_state = tx.update(jax.grad(loss_fn)(params, batch, dot), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    state = [(params, tx.init(params))]

    def run() -> Any:
        state[0] = step(*state[0])
        return state[0]

    return run


def hidden_shapes(config: Config) -> list[tuple[int, int]]:
    """Of 784-W-...-W-10, without the output layer, which stays dense."""
    return list(itertools.pairwise([NUM_INPUTS] + [config.width] * config.num_hidden))


def dense_step(config: Config) -> Callable[[], Any]:
    """A whole train step of the dense network."""
    shapes = hidden_shapes(config)
    keys = jax.random.split(jax.random.key(1), len(shapes))
    weights = [jax.random.normal(key, shape) / jnp.sqrt(shape[0]) for key, shape in zip(keys, shapes, strict=True)]
    return train_step(lambda i, x, w: x @ w, weights, config)


def sparse_networks(config: Config) -> Iterator[tuple[str, list[layers.Connections], list[jax.Array]]]:
    """Name, connections and weights of each network to measure."""
    shapes = hidden_shapes(config)
    keys = jax.random.split(jax.random.key(1), len(shapes))
    for kind, sparsity in itertools.product(config.layers, config.sparsities):
        connections = [connect(kind, key, *shape, sparsity) for key, shape in zip(keys, shapes, strict=True)]
        weights = [layers.init_values(key, c) for key, c in zip(keys, connections, strict=True)]
        yield f"{kind}, {sparsity:.1%}", connections, weights


def mlp_steps(config: Config) -> dict[str, Callable[[], Any]]:
    """Whole train steps."""
    steps = {"dense": dense_step(config)}
    for name, connections, weights in sparse_networks(config):

        def dot(i: int, x: jax.Array, w: jax.Array, connections: Any = connections) -> jax.Array:
            return layers.sparse_dot(x, w, connections[i])

        steps[name] = train_step(dot, weights, config)
    return steps


def sparse_loss(params: Any, batch: Any, connections: Any) -> jax.Array:
    """As `layers.rewire` takes it."""
    return loss_fn(params, batch, lambda i, x, w: layers.sparse_dot(x, w, connections["hidden"][i]))


def rewirings(config: Config) -> dict[str, Callable[[], Any]]:
    """Topology updates by RigL, over whole train steps of the dense network."""
    steps = {"dense": dense_step(config)}
    topology = agent_optax.rigl()
    for name, connections, weights in sparse_networks(config):
        params, batch, tx = start(weights, config)
        arguments = (sparse_loss, params, {"hidden": connections}, tx.init(params), batch)
        options = {"tx": tx, "topology": topology, "step": 100, "key": jax.random.key(0)}
        steps[name] = functools.partial(layers.rewire, *arguments, **options)
        drawn = f"{name}, {config.candidates:g} candidates a weight"
        steps[drawn] = functools.partial(layers.rewire, *arguments, candidates=config.candidates, **options)
    return steps


def conv_steps(config: Config) -> dict[str, Callable[[], Any]]:
    """Forward and backward passes of one 3 x 3 convolution, [batch, height, width, channels] in and out."""
    channels, keys = config.channels, jax.random.split(jax.random.key(2), 3)
    x = jax.random.normal(keys[0], (config.conv_batch, config.size, config.size, channels))
    dy = jax.random.normal(keys[1], x.shape)

    def both_passes(conv: Callable[[jax.Array, jax.Array], jax.Array], weights: jax.Array) -> Callable[[], Any]:
        def passes(x: jax.Array, weights: jax.Array, dy: jax.Array) -> Any:
            y, gradients = jax.vjp(conv, x, weights)
            return y, gradients(dy)

        compiled = jax.jit(passes)
        return lambda: compiled(x, weights, dy)

    def dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)

    steps = {"dense": both_passes(dense, jax.random.normal(keys[2], (3, 3, channels, channels)))}
    for kind, sparsity in itertools.product(config.layers, config.sparsities):
        connections = connect(kind, keys[2], 9 * channels, channels, sparsity)

        def conv(x: jax.Array, values: jax.Array, connections: Any = connections) -> jax.Array:
            return layers.sparse_conv(x, values, connections, kernel_size=3)

        steps[f"{kind}, {sparsity:.1%}"] = both_passes(conv, jax.random.normal(keys[2], connections.values_shape))
    return steps


def forward_passes(config: Config) -> dict[str, Callable[[], Any]]:
    """One product with a W x W matrix: dense, by sparse layers, and by what `agent_optax.export` makes of any mask."""
    width, keys = config.width, jax.random.split(jax.random.key(3), 3)
    x = jax.random.normal(keys[0], (config.batch, width))
    steps: dict[str, Callable[[], Any]] = {}

    def add(name: str, product: Callable[[jax.Array, Any], jax.Array], weights: Any) -> None:
        steps[name] = functools.partial(jax.jit(product), x, weights)

    add("dense", operator.matmul, jax.random.normal(keys[1], (width, width)))
    for kind, sparsity in itertools.product(config.layers, config.sparsities):
        connections = connect(kind, keys[2], width, width, sparsity)
        values = layers.init_values(keys[1], connections)
        add(f"{kind}, {sparsity:.1%}", lambda x, layer: layers.sparse_dot(x, *layer), (values, connections))
        if kind == "any_mask":
            bcsr, bcoo = (to(values, connections) for to in (export.to_bcsr, export.to_bcoo))
            add(f"to_bcsr, {sparsity:.1%}", lambda x, matrix: (matrix @ x.T).T, bcsr)
            add(f"to_bcoo, {sparsity:.1%}", operator.matmul, bcoo)
    return steps


def main(config: Config) -> None:
    """Prints a table for each stage; writes JSON."""
    config = config.completed()
    rows = []
    network = f"{NUM_INPUTS}-{'-'.join([str(config.width)] * config.num_hidden)}-{NUM_CLASSES}, batch {config.batch}"
    titles = {
        "mlp": f"train step, {network}, momentum {config.momentum:g}",
        "rewire": f"topology update, {network}, over a dense train step",
        "conv": f"3 x 3 convolution, {config.channels} channels, {config.size} x {config.size}, "
        f"batch {config.conv_batch}, forward and backward",
        "forward": f"product, {config.width} x {config.width}, batch {config.batch}, forward",
    }
    for stage in config.stages:
        make = {"mlp": mlp_steps, "rewire": rewirings, "conv": conv_steps, "forward": forward_passes}[stage]
        steps = make(config)
        seconds = interleaved_seconds(steps, config.rounds)
        table = Table(title=titles[stage])
        for column in ("layer", "ms", "ratio to dense"):
            table.add_column(column, justify="left" if column == "layer" else "right")
        for name in steps:
            milliseconds = 1e3 * statistics.median(seconds[name])
            ratio = median_ratio(seconds, name, "dense")
            rows.append({"stage": stage, "layer": name, "ms": milliseconds, "ratio": ratio})
            table.add_row(name, f"{milliseconds:.2f}", f"{ratio:.3f}")
        Console(width=120).print(table)
    write_report(config.output, config, rows)


if __name__ == "__main__":
    main(tyro.cli(Config))
