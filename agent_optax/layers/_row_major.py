"""The memory layout of activations inside a sparse layer."""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental import layout

# jax < 0.7 has it by the first name, and means by the second what is called Format now.
_Layout: Any = getattr(layout, "DeviceLocalLayout", None) or layout.Layout


def row_major(x: jax.Array) -> jax.Array:
    """x, whose rows are to be contiguous in memory.

    Features first, a row is one feature of all samples, and looking it up copies one piece of memory. XLA is free to
    store the transposed array instead, and where it does, each look-up collects single numbers: in the backward pass of
    a layer whose neighbors work batch first it was twice as slow so.
    """
    return layout.with_layout_constraint(x, _Layout(tuple(range(x.ndim))))
