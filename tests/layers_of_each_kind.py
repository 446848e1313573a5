"""Connections of every kind, and what they are compared with."""

import jax

from agent_optax import layers

KINDS = ("fan_in:3", "fan_in:16", "any_mask")  # groups of up to 15 outputs are sums of rows
OTHER_SIZES = ("fan_in:1", "fan_in:24")


def connect(kind: str, inputs: int, outputs: int, density: float = 0.3, seed: int = 0) -> layers.Connections:
    key = jax.random.key(seed)
    if kind == "any_mask":
        return layers.AnyMask.random(key, inputs=inputs, outputs=outputs, density=density)
    group = int(kind.split(":")[1])
    return layers.FanIn.random(key, inputs=inputs, outputs=outputs, density=density, group=group)
