"""The multiplications of a convolution."""

from __future__ import annotations

import math
from typing import Any


def conv_products(eqn: Any) -> int:
    """Multiply-adds of a ``conv_general_dilated`` equation.

    Each entry of the output takes one product for each kernel position and each input channel of its group. Padding
    counts. The zeros that a transposed convolution puts between its inputs do not.
    """
    dimensions = eqn.params["dimension_numbers"]
    inputs, kernel = (atom.aval.shape for atom in eqn.invars)
    output = eqn.outvars[0].aval.shape
    out_batch, out_channels, *out_axes = dimensions.out_spec
    _, in_channels, *kernel_axes = dimensions.rhs_spec
    channels = output[out_batch] * output[out_channels] * kernel[in_channels]
    positions = [
        _positions(output[o], kernel[k], inputs[i], stride, low, spread, dilation)
        for o, k, i, stride, (low, _), spread, dilation in zip(
            out_axes,
            kernel_axes,
            dimensions.lhs_spec[2:],
            eqn.params["window_strides"],
            eqn.params["padding"],
            eqn.params["lhs_dilation"],
            eqn.params["rhs_dilation"],
            strict=True,
        )
    ]
    return channels * math.prod(positions)


def _positions(
    output: int, kernel: int, inputs: int, stride: int, low_padding: int, input_dilation: int, kernel_dilation: int
) -> int:
    """Pairs of an output and a kernel position along one axis that meet an input, or padding around it."""
    if input_dilation == 1:
        return output * kernel
    places = (o * stride + k * kernel_dilation - low_padding for o in range(output) for k in range(kernel))
    return sum(place % input_dilation == 0 and 0 <= place // input_dilation < inputs for place in places)
