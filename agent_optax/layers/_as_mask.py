"""The mask of a layer as connections are made of it."""

from __future__ import annotations

from typing import Any

import numpy as np
from jax.core import Tracer


def as_mask(mask: Any) -> np.ndarray:
    """The mask in NumPy, checked."""
    if isinstance(mask, Tracer):
        raise TypeError("mask must be known: its number of True entries is a shape. Build connections outside jax.jit.")
    array = np.asarray(mask)
    if array.ndim != 2 or array.dtype != bool or 0 in array.shape:
        raise ValueError(
            f"mask must be a bool array [inputs, outputs], got {array.dtype} {list(array.shape)}. Reshape the mask of "
            "a convolution to [height * width * channels in, channels out]."
        )
    return array
