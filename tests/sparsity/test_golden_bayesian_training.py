"""A whole run of A-BSR-Net without adversary: 8-7-4 with batch normalisation, five epochs, 20 steps.

Which positions are regrown, and the noise, are random: those that the published run drew are put in, and everything
else is ours, connections and hidden weights included. The published snapshot is overwritten before its losses are
compared, which makes the estimate of the coefficient 1 whatever the data: it is put in as a schedule.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from conformance import jit

import agent_optax

NEW = np.float32(1e-12)
LAYERS = ("theta0", "theta1")
EPSILON = 1e-5


def loss(params, batch):
    x, y = batch
    h = jax.nn.relu(x @ params["theta0"] + params["b0"])
    mean, variance = h.mean(0), h.var(0)
    h = params["gamma0"] * (h - mean) / jnp.sqrt(variance + EPSILON) + params["beta0"]
    logits = jax.nn.relu(h) @ params["theta1"] + params["b1"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def optimizer(run, num_batches):
    lr, momentum, weight_decay, gamma = run["hyper"][:4].tolist()
    total = num_batches * len(run["perm"])
    boundaries = {int(0.25 * total) + 1: 0.1, int(0.5 * total) + 1: 0.05}
    rate = optax.piecewise_constant_schedule(lr, boundaries)
    decay = optax.piecewise_constant_schedule(weight_decay, boundaries)
    taus = run["tau"]  # the published snapshot is overwritten before it is used: tau does not depend on the losses
    inner = optax.chain(
        agent_optax.correct_gradients(
            agent_optax.snapshot(), agent_optax.scheduled(lambda count: jnp.asarray(taus)[count]), scaling=gamma
        ),
        optax.scale_by_schedule(lambda count: -rate(count)),
        optax.trace(momentum),
        decoupled(decay),
        noise(lambda count: jnp.sqrt(2 * rate(count) / num_batches)),
    )
    topology = agent_optax.bayesian_rewiring(0.0, steps_per_epoch=num_batches, density=0.0)
    masks = dict.fromkeys(("b0", "gamma0", "beta0", "b1"))
    masks |= {f"theta{k}": run[f"init_theta{k}"] > 0 for k in (0, 1)}
    return agent_optax.sparsify(inner, topology, masks=masks)


def test_whole_run(golden):
    run = golden("e2e_bsr")
    batch = int(run["hyper"][6])
    num_batches = len(run["y"]) // batch
    sign = {f"theta{k}": jnp.asarray(run[f"sign{k}"]) for k in (0, 1)}
    tx = optimizer(run, num_batches)
    names = ("theta0", "b0", "gamma0", "beta0", "theta1", "b1")
    theta = {name: jnp.asarray(run[f"init_{name}"]) for name in names}
    # Signs of positions without a weight come from parameters that are not zero there.
    dense = {**theta, **{k: sign[k] * jnp.where(theta[k] > 0, theta[k], 1.0) for k in LAYERS}}
    opt_state = tx.init(dense)
    params = agent_optax.mask_params(dense, opt_state)
    grads_fn = agent_optax.value_and_grads(loss)

    @jit
    def train_step(params, opt_state, batch, noises):
        (value, grads), extras = grads_fn(params, opt_state, batch)
        updates, opt_state = tx.update(grads, opt_state, params, noises=noises, **extras)
        return optax.apply_updates(params, updates), opt_state, value

    x, y, order = run["X"], run["y"], np.arange(len(run["y"]))
    step, num_reborn = 0, 0
    for epoch, perm in enumerate(run["perm"]):
        order = order[perm]
        xe, ye = x[order], y[order]
        anchor = (xe.reshape(num_batches, batch, -1), ye.reshape(num_batches, batch))
        opt_state = agent_optax.refresh(loss, params, opt_state, anchor)
        for k in range(num_batches):
            ids = run["order_flow"][epoch][k * batch : (k + 1) * batch]
            compare(run, "before", step, params, opt_state, sign)
            connected = opt_state.active_weights.is_connected
            noises = {
                name: jnp.where(connected[name], sign[name] * run[f"noise{layer}"][step], 0)
                for layer, name in enumerate(LAYERS)
            }
            noises |= {name: jnp.zeros(()) for name in names if name not in LAYERS}
            params, opt_state, value = train_step(params, opt_state, (xe[ids], ye[ids]), noises)
            np.testing.assert_allclose(value, run["train_loss"][step], rtol=6e-3)  # printed with three digits
            compare(run, "prerew", step, params, opt_state, sign)
            params, opt_state, reborn = reconnect(run, step, params, opt_state, sign)
            num_reborn += reborn
            assert int(opt_state.active_weights.num_active()) == run["conn_total"][step]
            step += 1
    assert step == len(run["train_loss"]) and num_reborn > 0


def compare(run, when, step, params, opt_state, sign):
    active = opt_state.active_weights
    for layer, name in enumerate(LAYERS):
        published = run[f"{when}_theta{layer}"][step]
        np.testing.assert_array_equal(active.is_connected[name], published > 0)
        ours = sign[name] * jnp.where(active.is_connected[name], params[name], active.latent_weights[name])
        np.testing.assert_allclose(ours, published, rtol=2e-4, atol=2e-6)
    if when == "before":
        for name in ("b0", "gamma0", "beta0", "b1"):
            np.testing.assert_allclose(params[name], run[f"before_{name}"][step], rtol=2e-4, atol=2e-6)


def reconnect(run, step, params, opt_state, sign):
    """Puts in the positions that the published run drew."""
    params, active = dict(params), opt_state.active_weights
    connected, hidden = dict(active.is_connected), dict(active.latent_weights)
    reborn = 0
    for layer, name in enumerate(LAYERS):
        is_new = (run[f"prerew_theta{layer}"][step] <= 0) & (run[f"postrew_theta{layer}"][step] > 0)
        params[name] = jnp.where(is_new, sign[name] * NEW, params[name])
        hidden[name] = jnp.where(is_new, 0, hidden[name])
        connected[name] = connected[name] | is_new
        reborn += is_new.sum()
    return (
        params,
        opt_state._replace(active_weights=active._replace(is_connected=connected, latent_weights=hidden)),
        reborn,
    )


def decoupled(decay):
    """SGDW's weight decay: not multiplied by the learning rate, and of disconnected weights too."""

    def update(updates, state, params):
        return jax.tree.map(lambda u, p: u - decay(state) * p, updates, params), state + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)


def noise(std):
    """Noise that the step is given."""

    def update(updates, state, params=None, *, noises, **extra_args):
        return jax.tree.map(lambda u, n: u + std(state) * n, updates, noises), state + 1

    return optax.GradientTransformationExtraArgs(lambda params: jnp.zeros((), jnp.int32), update)
