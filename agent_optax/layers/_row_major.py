"""The memory layout of activations inside a sparse layer."""

from __future__ import annotations

import jax
from jax.experimental import layout

_Layout = layout.Layout if hasattr(layout, "with_layout_constraint") else None
if not hasattr(layout, "Format"):  # jax < 0.7, where Layout is what is called Format now
    _Layout = getattr(layout, "DeviceLocalLayout", None)


def row_major(x: jax.Array) -> jax.Array:
    """x, whose rows are to be contiguous in memory.

    Features first, a row is one feature of all samples, and looking it up copies one piece of memory. XLA is free to
    store the transposed array instead, and where it does, each look-up collects single numbers: in the backward pass of
    a layer whose neighbors work batch first it was twice as slow so.
    """
    return layout.with_layout_constraint(x, _Layout(tuple(range(x.ndim))))
