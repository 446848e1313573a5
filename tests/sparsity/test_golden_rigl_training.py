"""A whole run of A-RigL with AGENT: parameters, losses, coefficients and masks of the clean Algorithm 1.

What that program does otherwise is put around our optimizer here: a topology update takes the place of the step of its
batch, and every weight that it grows is set to 0, also one that it dropped at the same time.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from conformance import jit

import agent_optax

DOUBLE = {"rtol": 1e-9, "atol": 1e-12}
NAMES = ("fc0_weight", "fc0_bias", "fc1_weight", "fc1_bias")
PRUNED = ("fc0_weight", "fc1_weight")


def label_smoothing_loss(smoothing):
    def loss(params, batch):
        """16-14-5, relu; weights have PyTorch's layout, (out, in)."""
        x, y = batch
        x = jax.nn.relu(x @ params["fc0_weight"].T + params["fc0_bias"])
        log_p = jax.nn.log_softmax(x @ params["fc1_weight"].T + params["fc1_bias"])
        nll = -jnp.take_along_axis(log_p, y[:, None], axis=1)[:, 0]
        return jnp.mean(smoothing * -log_p.mean(1) + (1 - smoothing) * nll)

    return loss


def pausing(inner, learning_rates, is_paused):
    """`inner` with learning rates that count paused steps; there no weight moves and the state stays as it is."""

    def init(params):
        return jnp.ones((), jnp.int32), inner.init(params)

    def update(updates, state, params, **extra_args):
        step, inner_state = state
        moved, new_state = inner.update(updates, inner_state, params, **extra_args)
        paused = is_paused(step)
        keep = lambda new, old: jnp.where(paused, old, new)  # noqa: E731
        return (
            jax.tree.map(lambda u: jnp.where(paused, 0, -learning_rates(step) * u), moved),
            (step + 1, jax.tree.map(keep, new_state, inner_state)),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def test_whole_run(x64, golden):
    numbers = golden("e2e_rigl")
    learning_rate, momentum, weight_decay, scaling, smoothing, label_smoothing = numbers["hyper"].tolist()
    interval, end, drop_fraction, decay_every, decay_factor = numbers["sparse_hyper"].tolist()
    interval, end, decay_every = int(interval), int(end), int(decay_every)
    loss_fn = label_smoothing_loss(label_smoothing)
    cosine = optax.cosine_decay_schedule(drop_fraction, end)
    drop_fractions = lambda step: cosine(step - 2)  # the rate that the step before left  # noqa: E731
    topology = agent_optax.rigl(interval, drop_fractions, stop=end + 1)
    is_update = lambda step: (step % interval == 0) & (step <= end)  # noqa: E731
    inner = optax.chain(
        agent_optax.correct_gradients(
            agent_optax.snapshot(), agent_optax.loss_regression(smoothing=smoothing, clip=False), scaling=scaling
        ),
        optax.add_decayed_weights(weight_decay, lambda params: jax.tree.map(lambda p: p.ndim > 1, params)),
        optax.trace(momentum, nesterov=True),
    )
    learning_rates = lambda step: learning_rate * decay_factor ** ((step - 1) // decay_every)  # noqa: E731
    tx = agent_optax.sparsify(
        pausing(inner, learning_rates, is_update),
        topology,
        masks={name: numbers[f"mask0_{name}"] if name in PRUNED else None for name in NAMES},
    )
    params = {name: jnp.asarray(numbers[f"init_{name}"]) for name in NAMES}
    opt_state = tx.init(params)
    params = agent_optax.mask_params(params, opt_state)
    grads_fn = agent_optax.value_and_grads(loss_fn)

    @jit
    def train_step(params, opt_state, batch):
        (value, grads), extras = grads_fn(params, opt_state, batch)
        updates, opt_state = tx.update(grads, opt_state, params, **extras)
        return optax.apply_updates(params, updates), opt_state, value

    x, y = numbers["X"], numbers["y"]
    step, num_reset = 0, 0
    for epoch, (anchor, update) in enumerate(zip(numbers["idx_anchor"], numbers["idx_update"], strict=True)):
        opt_state = agent_optax.refresh(loss_fn, params, opt_state, (x[anchor], y[anchor]))
        losses = []
        for samples in update:
            step += 1
            before = {name: (np.asarray(params[name]), active_mask(opt_state, params, name)) for name in PRUNED}
            params, opt_state, value = train_step(params, opt_state, (x[samples], y[samples]))
            losses.append(value)
            if is_update(step):
                fraction = float(drop_fractions(step))
                np.testing.assert_allclose(fraction, numbers["alg1_prune_rate"][step // interval - 1], rtol=1e-12)
                for name, (weights, mask) in before.items():
                    back = dropped(weights, mask, fraction) & active_mask(opt_state, params, name)
                    params[name] = jnp.where(back, 0, params[name])
                    num_reset += back.sum()
        np.testing.assert_allclose(losses, numbers["alg1_loss"][epoch], **DOUBLE)
        report = agent_optax.diagnostics(opt_state)
        np.testing.assert_allclose(report["correlation"], numbers["alg1_tau"][epoch], **DOUBLE)
        for name in NAMES:
            np.testing.assert_allclose(params[name], numbers[f"alg1_p_{name}"][epoch], **DOUBLE)
        for name in PRUNED:
            np.testing.assert_array_equal(
                active_mask(opt_state, params, name), numbers[f"alg1_mask_{name}"][epoch].astype(bool)
            )
    assert report["num_topology_updates"] == len(numbers["alg1_prune_rate"])
    assert num_reset > 0  # the data contain the case in which the rules differ


def active_mask(opt_state, params, name):
    return np.asarray(agent_optax.active_masks(opt_state, params)[name])


def dropped(weights, mask, fraction):
    """The ceil(fraction * active) active weights of least magnitude."""
    magnitude = np.where(mask, np.abs(weights), np.inf)
    n = int(np.ceil(fraction * mask.sum()))
    return magnitude <= np.sort(magnitude.ravel())[n - 1]
