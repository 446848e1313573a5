"""Whole kernels of a convolution dropped and grown by A-RigL's structured rules.

A kernel is the spatial slice of one input and one output channel. The published scores are the magnitude of a *signed*
mean, largest or smallest weight of the kernel.
"""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import agent_optax

LAYERS = (0, 1)
REDUCE = {"mean": jnp.mean, "max": jnp.max, "min": jnp.min}


@pytest.mark.parametrize("weights", ["mean", "max"])
@pytest.mark.parametrize("grads", ["mean", "min"])
def test_kernels(x64, golden, weights, grads):
    numbers = golden("struct_rigl")
    pattern = agent_optax.blocks((1, 1, -1, -1), REDUCE[weights], REDUCE[grads])  # PyTorch's layout
    tx = agent_optax.sparsify(
        optax.set_to_zero(),
        agent_optax.rigl(update_every=1, drop_fraction=float(numbers["rate"])),
        masks=[numbers[f"mask_{layer}"] for layer in LAYERS],
        pattern=pattern,
    )
    params = [jnp.asarray(numbers[f"w_{layer}"]) for layer in LAYERS]
    opt_state = tx.init(params)
    updates, opt_state = tx.update([jnp.asarray(numbers[f"g_{layer}"]) for layer in LAYERS], opt_state, params)
    params = optax.apply_updates(params, updates)
    for layer, mask in enumerate(agent_optax.active_masks(opt_state, params)):
        np.testing.assert_array_equal(mask, numbers[f"p{weights}_g{grads}_mask_{layer}"])
        assert np.any(mask != numbers[f"mask_{layer}"])
