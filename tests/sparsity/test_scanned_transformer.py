"""A transformer scanned over its layers and the same one unrolled: the same masks, and trained, the same numbers."""

from typing import Any

import jax
import numpy as np
import pytest
from scanned_transformer import NUM_LAYERS, WIDTH, initial_params, trained, unrolled

import agent_optax


@pytest.mark.parametrize(("storage", "pattern"), [("dense", agent_optax.n_m(2, 4)), ("compact", None)])
def test_scanned_and_unrolled(storage: str, pattern: Any) -> None:
    params = initial_params()
    sparsity = 0.8 if pattern is None or pattern.density is None else None
    masks = agent_optax.magnitude_masks(params, sparsity, scope="layer", pattern=pattern)
    own_masks = agent_optax.magnitude_masks(unrolled(params), sparsity, scope="layer", pattern=pattern)
    jax.tree.map(np.testing.assert_array_equal, own_masks, unrolled(masks))

    after, weights = trained(True, params, masks, storage, pattern)
    own_after, own_weights = trained(False, unrolled(params), own_masks, storage, pattern)
    jax.tree.map(np.testing.assert_array_equal, own_after, unrolled(after))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), own_weights, unrolled(weights))
    changed = sum(
        int(np.sum(old != new)) for old, new in zip(jax.tree.leaves(masks), jax.tree.leaves(after), strict=True)
    )
    assert changed > 100
    if pattern is not None and pattern.density is not None:
        for name in ("query", "key", "value", "out"):
            matrices = np.asarray(after["blocks"]["attention"][name]["kernel"]).reshape(NUM_LAYERS, 4, 4, WIDTH)
            assert np.all(matrices.sum(2) == 2), name
