"""The connections of a sparse layer as the compressed rows of a matrix [outputs, inputs]."""

from __future__ import annotations

import numpy as np

from agent_optax.layers import Connections


def compressed_rows(connections: Connections) -> tuple[np.ndarray, np.ndarray]:
    """The input of each weight, int32 [weights], and where those of each output begin, int32 [outputs + 1]."""
    inputs, outputs = map(np.asarray, connections.coordinates())
    return inputs, row_starts(np.bincount(outputs, minlength=connections.outputs))


def row_starts(counts: np.ndarray) -> np.ndarray:
    """From the numbers of entries of rows, [..., rows], where each begins and the last ends, int32 [..., rows + 1]."""
    return np.concatenate([np.zeros_like(counts[..., :1]), np.cumsum(counts, axis=-1)], axis=-1).astype(np.int32)
