"""Optimizer steps on an accelerator, as ratios to plain Optax, and its topology updates against those of the CPU.

Needs nothing but the library: `python benchmarks/accelerator.py`. Steps on 5M parameters measure the launch of kernels,
those on 50M memory.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from interleaved import interleaved_seconds, median_ratio

import agent_optax

NUM_PARAMS = (5_000_000, 50_000_000)
SPARSITIES = (0.9, 0.99)
ROUNDS, CALLS = 15, 20  # a round takes so many steps of each optimizer
NEVER = 10**9  # an interval that no step reaches
INNER = {"sgd": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True), "adamw": lambda: optax.adamw(1e-3)}
STORAGES = {"dense": {}, "compact": {"updates": "sparse"}}


def kernels(num_params: int) -> dict[str, jax.Array]:
    """Three square kernels."""
    width = int((num_params / 3) ** 0.5)
    return {f"kernel_{i}": jax.random.normal(jax.random.key(i), (width, width)) for i in range(3)}


def optimizers() -> dict[str, tuple[str, Any]]:
    """Name -> (baseline, optimizer)."""
    cases = {}
    for name, make in INNER.items():
        cases[name] = (name, make())
        for sparsity in SPARSITIES:
            for storage, options in STORAGES.items():
                rigl = agent_optax.rigl(NEVER)
                tx = agent_optax.sparsify(make(), rigl, sparsity=sparsity, storage=storage, **options)
                cases[f"RigL, {name}, {storage}, {sparsity:.0%}"] = (name, tx)
    return cases


def donated_steps(tx: Any, params: Any, grads: Any) -> Callable[[], Any]:
    """A closure that takes `CALLS` steps a call, and leaves it to the caller to wait for them."""
    opt_state = jax.jit(tx.init)(params)
    if isinstance(opt_state, agent_optax.SparsifyState):
        params = agent_optax.mask_params(params, opt_state)

    def step(params: Any, opt_state: Any, grads: Any) -> Any:
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    compiled = jax.jit(step, donate_argnums=(0, 1))
    carried = [jax.tree.map(jnp.copy, params), opt_state]

    def run() -> Any:
        for _ in range(CALLS):
            carried[:] = compiled(*carried, grads)
        return carried[0]

    return run


def ordinary_steps(num_params: int) -> None:
    """Prints a row an optimizer."""
    params = kernels(num_params)
    grads = jax.tree.map(lambda p: 1e-3 * p, params)
    cases = optimizers()
    seconds = interleaved_seconds({name: donated_steps(tx, params, grads) for name, (_, tx) in cases.items()}, ROUNDS)
    for name, (baseline, _) in cases.items():
        milliseconds = 1e3 * statistics.median(seconds[name]) / CALLS
        ratio = median_ratio(seconds, name, baseline)
        print(f"{num_params / 1e6:g}M, {name}: {milliseconds:.3f} ms, {ratio:.2f} of {baseline}")


def topology_update(storage: str) -> None:
    """Prints its time; the masks must be those that the CPU finds."""
    params = kernels(NUM_PARAMS[0])
    grads = jax.tree.map(jnp.sin, params)
    tx = agent_optax.sparsify(optax.sgd(0.1, momentum=0.9), agent_optax.rigl(1), sparsity=0.9, storage=storage)
    opt_state = jax.jit(tx.init)(params)
    params = agent_optax.mask_params(params, opt_state)
    update = jax.jit(tx.update)
    _, after = jax.block_until_ready(update(grads, opt_state, params))
    began = time.perf_counter()
    jax.block_until_ready([update(grads, opt_state, params) for _ in range(5)])
    print(f"step with a topology update, {storage}: {(time.perf_counter() - began) / 5 * 1e3:.2f} ms")
    cpu = jax.devices("cpu")[0]
    on_cpu = jax.device_put((grads, opt_state, params), cpu)
    _, expected = jax.jit(tx.update)(*on_cpu)
    masks = agent_optax.active_masks(after, params)
    for name, mask in agent_optax.active_masks(expected, on_cpu[2]).items():
        np.testing.assert_array_equal(masks[name], mask)


if __name__ == "__main__":
    print(jax.devices()[0].device_kind, "jax", jax.__version__, "optax", optax.__version__)
    for size in NUM_PARAMS:
        ordinary_steps(size)
    for name in STORAGES:
        topology_update(name)
