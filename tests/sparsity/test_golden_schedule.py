"""The drop fraction of ITOP falls as in the authors' published code."""

import jax
import numpy as np
import pytest

import agent_optax
from agent_optax.sparsity.topologies._set import itop_drop_fraction


@pytest.mark.parametrize("preset", [agent_optax.set_itop, agent_optax.rigl_itop])
def test_presets(x64, golden, preset):
    numbers = golden("cosine_itop")
    initial, total_steps = numbers["r0_T_0"].tolist()
    assert initial == 0.5
    schedule = jax.jit(preset(int(total_steps)).drop_fraction)
    fractions = [schedule(step) for step in range(len(numbers["dr_0"]))]
    np.testing.assert_allclose(fractions, numbers["dr_0"], rtol=1e-9)


def test_another_start(x64, golden):
    numbers = golden("cosine_itop")
    initial, total_steps = numbers["r0_T_1"].tolist()
    schedule = jax.jit(itop_drop_fraction(int(total_steps), initial))
    fractions = [schedule(step) for step in range(len(numbers["dr_1"]))]
    np.testing.assert_allclose(fractions, numbers["dr_1"], rtol=1e-9)
