"""A whole sparse AGENT run gives the numbers of the authors' published code."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from conformance import jit

import agent_optax

DOUBLE = {"rtol": 1e-9, "atol": 1e-12}  # atol: rounding of entries that are themselves sums of larger ones
PRUNED = ("fc0_weight", "fc1_weight")


def mlp_loss(params, batch):
    """20-16-5, relu; weights have PyTorch's layout, (out, in)."""
    x, y = batch
    x = jax.nn.relu(x @ params["fc0_weight"].T + params["fc0_bias"])
    logits = x @ params["fc1_weight"].T + params["fc1_bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def test_sparse_training_run(x64, golden):
    """Five epochs of A-ITOP, grown by gradient: parameters, losses, coefficients, masks and what they explored."""
    numbers = golden("e2e_sparse")
    learning_rate, momentum, weight_decay, scaling, smoothing = numbers["hyper"].tolist()
    update_every, initial, final, total_steps, _ = numbers["sparse_hyper"].tolist()
    assert (initial, final) == (0.5, 0.005)  # those of rigl_itop
    topology = agent_optax.rigl_itop(int(total_steps), update_every=int(update_every))
    inner = optax.chain(
        agent_optax.correct_gradients(
            memory=agent_optax.snapshot(),
            coefficient=agent_optax.loss_regression(smoothing=smoothing, clip=False),
            scaling=scaling,
        ),
        optax.add_decayed_weights(weight_decay),
        optax.sgd(learning_rate, momentum=momentum, nesterov=True),
    )
    names = [name.removeprefix("init_") for name in numbers if name.startswith("init_")]
    masks = {name: numbers[f"mask0_{name}"] if name in PRUNED else None for name in names}
    tx = agent_optax.sparsify(inner, topology, masks=masks, storage="dense")
    params = {name: jnp.asarray(numbers[f"init_{name}"]) for name in names}
    opt_state = tx.init(params)
    params = agent_optax.mask_params(params, opt_state)
    x, y = numbers["X"], numbers["y"]
    grads_fn = agent_optax.value_and_grads(mlp_loss)

    @jit
    def train_step(params, opt_state, batch):
        (value, grads), extras = grads_fn(params, opt_state, batch)
        updates, opt_state = tx.update(grads, opt_state, params, **extras)
        return optax.apply_updates(params, updates), opt_state, value

    step = 0
    for epoch, (anchor, update) in enumerate(zip(numbers["idx_anchor"], numbers["idx_update"], strict=True)):
        opt_state = agent_optax.refresh(mlp_loss, params, opt_state, (x[anchor], y[anchor]))
        losses = []
        for samples in update:
            active = agent_optax.active_masks(opt_state, params)
            params, opt_state, value = train_step(params, opt_state, (x[samples], y[samples]))
            losses.append(value)
            step += 1
            for name in PRUNED:
                assert not np.any(np.asarray(params[name])[~np.asarray(active[name])])
            np.testing.assert_allclose(topology.drop_fraction(step), numbers["alg1_death_rate"][step - 1], rtol=1e-9)
            assert agent_optax.diagnostics(opt_state)["num_topology_updates"] == step // update_every

        report = agent_optax.diagnostics(opt_state)
        np.testing.assert_allclose(report["correlation"], numbers["alg1_tau"][epoch], **DOUBLE)
        np.testing.assert_allclose(losses, numbers["alg1_loss"][epoch], **DOUBLE)
        np.testing.assert_allclose(report["exploration_rate"], numbers["alg1_Rs"][epoch], rtol=1e-6)  # a float32
        active = agent_optax.active_masks(opt_state, params)
        ever_active = optax.tree.get(opt_state, "ever_active")
        mean_grads = optax.tree.get(opt_state, "mean_grads")
        for name in names:
            np.testing.assert_allclose(params[name], numbers[f"alg1_p_{name}"][epoch], **DOUBLE)
            np.testing.assert_allclose(mean_grads[name], numbers[f"alg1_u_sum_{name}"][epoch] / len(anchor), **DOUBLE)
        for name in PRUNED:
            np.testing.assert_array_equal(active[name], numbers[f"alg1_mask_{name}"][epoch])
            np.testing.assert_array_equal(ever_active[name], numbers[f"alg1_fired_{name}"][epoch])
    assert step == total_steps
