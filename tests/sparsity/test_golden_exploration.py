"""What a sequence of topology updates explores is what the authors' published code explored."""

import jax.numpy as jnp
import numpy as np
import optax
from conformance import jit

import agent_optax

LAYERS = (0, 1, 2)


def test_exploration_rate(x64, golden):
    """Six updates by magnitude and gradient; between them noise moves the active weights."""
    numbers = golden("explore_itop")
    num_updates = len(numbers["Rs"])
    topology = agent_optax.rigl_itop(total_steps=num_updates, update_every=1)
    masks = [numbers[f"mask0_{layer}"] for layer in LAYERS]
    params = [jnp.asarray(numbers[f"w0_{layer}"]) for layer in LAYERS]
    tx = agent_optax.sparsify(optax.sgd(0.0), topology, masks=masks)
    opt_state = tx.init(params)
    update = jit(tx.update)
    for t in range(num_updates):
        np.testing.assert_allclose(topology.drop_fraction(t + 1), numbers["death_rate"][t], rtol=1e-9)
        noise = [jnp.asarray(numbers[f"noise_{layer}"][t]) for layer in LAYERS]
        grads = [jnp.asarray(numbers[f"g_{layer}"][t]) for layer in LAYERS]
        params = agent_optax.mask_params([p + n for p, n in zip(params, noise, strict=True)], opt_state)
        updates, opt_state = update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)

        active = agent_optax.active_masks(opt_state, params)
        ever_active = optax.tree.get(opt_state, "ever_active")
        for layer in LAYERS:
            np.testing.assert_array_equal(active[layer], numbers[f"mask_{layer}"][t])
            np.testing.assert_array_equal(ever_active[layer], numbers[f"fired_{layer}"][t])
            np.testing.assert_allclose(params[layer], numbers[f"w_{layer}"][t], rtol=1e-12)
            explored = np.mean(ever_active[layer], dtype=np.float64)
            np.testing.assert_allclose(explored, numbers["Rs_layer"][t, layer], rtol=1e-12)
        rate = agent_optax.diagnostics(opt_state)["exploration_rate"]
        np.testing.assert_allclose(rate, numbers["Rs"][t], rtol=1e-6)  # a float32
    assert agent_optax.diagnostics(opt_state)["num_topology_updates"] == num_updates
