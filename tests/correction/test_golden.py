"""Corrected gradients give the numbers of the authors' published code."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import jit

import agent_optax

DOUBLE = {"rtol": 1e-9, "atol": 1e-12}  # atol: rounding of entries that are themselves sums of larger ones


def inner_product(params, grads):
    """A loss whose gradient at any parameters is the batch itself."""
    return sum(jnp.vdot(p, g) for p, g in zip(jax.tree.leaves(params), jax.tree.leaves(grads), strict=True))


STEPS = {  # SGD's momentum, whether it is Nesterov's, weight decay, learning rate
    "A": (0.9, True, 5e-4, 0.1),
    "B": (None, False, 0.0, 0.1),
    "C": (0.9, False, 1e-2, 0.05),
}


@pytest.mark.parametrize("variant, by", [("A", "schedule"), ("A", "state"), ("B", "schedule"), ("C", "schedule")])
def test_corrected_steps(x64, golden, variant, by):
    """The weight w = tau * gamma, negative and 0 among them, is another at each step: by a schedule or set in state."""
    numbers = golden("correction_step")
    tensors = [0, 1, 2]
    weights = jnp.asarray(numbers["tau_gamma"])
    if by == "schedule":
        correction = optax.inject_hyperparams(agent_optax.correct_gradients)(
            coefficient=agent_optax.constant(1.0), scaling=lambda step: weights[step]
        )
    else:
        correction = agent_optax.correct_gradients(coefficient=agent_optax.loss_regression(), scaling=1.0)
    momentum, nesterov, weight_decay, learning_rate = STEPS[variant]
    tx = optax.chain(
        correction,
        optax.add_decayed_weights(weight_decay),
        optax.sgd(learning_rate, momentum=momentum, nesterov=nesterov),
    )
    params = [jnp.asarray(numbers[f"p0_{i}"]) for i in tensors]
    opt_state = tx.init(params)
    update = jit(tx.update)

    for step, num_batches in enumerate(numbers["mul"]):
        # The mean gradient is another at each step too: that of one batch, which is the mean.
        means = [numbers[f"u_sum_{i}"][step][None] / num_batches for i in tensors]
        opt_state = agent_optax.refresh(inner_product, params, opt_state, means)
        if by == "state":
            opt_state = optax.tree.set(opt_state, correlation=weights[step])
        grads, old_grads = ([jnp.asarray(numbers[f"{name}_{i}"][step]) for i in tensors] for name in ("g", "g_old"))
        updates, opt_state = update(grads, opt_state, params, old_grads=old_grads)
        params = optax.apply_updates(params, updates)

        np.testing.assert_allclose(agent_optax.diagnostics(opt_state)["correction_weight"], weights[step], rtol=1e-15)
        for i in tensors:
            np.testing.assert_allclose(params[i], numbers[f"{variant}_p_{i}"][step], **DOUBLE)
            if momentum is not None:
                buffers = optax.tree.get(opt_state, "trace")
                np.testing.assert_allclose(buffers[i], numbers[f"{variant}_buf_{i}"][step], **DOUBLE)


@pytest.mark.parametrize(
    "expected, smoothing, initial",
    [("tau", "alpha", 0.1), ("tau_start0", "alpha", 0.0), ("tau_other_alpha", "other_alpha", 0.1)],
)
def test_coefficient_state_follows_the_epochs(x64, golden, expected, smoothing, initial):
    numbers = golden("corr_coef_itop")
    coefficient = agent_optax.loss_regression(smoothing=float(numbers[smoothing]), initial=initial, clip=False)
    # The published program smooths already in epoch 0, so that no pass is the first.
    taus = coefficients(coefficient, numbers["loss_curr"], numbers["loss_last"], is_first=lambda epoch: False)
    np.testing.assert_allclose(taus, numbers[expected], **DOUBLE)


def test_coefficient_without_smoothing_is_the_raw_estimate(x64, golden):
    numbers = golden("corr_coef_itop")
    coefficient = agent_optax.loss_regression(smoothing=1.0, clip=False)
    estimates = coefficients(coefficient, numbers["loss_curr"], numbers["loss_last"], is_first=lambda epoch: False)
    np.testing.assert_allclose(estimates, numbers["tau_curr"], **DOUBLE)
    assert estimates.min() < -1 and estimates.max() > 5  # nothing is clipped


def test_coefficient_clips_each_estimate_as_the_paper_has_it(x64, golden):
    """By default the estimates of the reference are clipped to [0, 1] before they are smoothed in."""
    numbers = golden("corr_coef_itop")
    coefficient = agent_optax.loss_regression(smoothing=0.3, initial=0.1)
    taus = coefficients(coefficient, numbers["loss_curr"], numbers["loss_last"], is_first=lambda epoch: False)
    expected, tau = [], 0.1
    for estimate in numbers["tau_curr"]:
        tau = 0.7 * tau + 0.3 * np.clip(estimate, 0, 1)
        expected.append(tau)
    np.testing.assert_allclose(taus, expected, **DOUBLE)


def test_first_pass_of_algorithm_1_gives_no_estimate(x64, golden):
    """A-BSR-Net discards the estimate of epoch 0, as Algorithm 1 does."""
    numbers = golden("corr_coef_bsr")
    coefficient = agent_optax.loss_regression(smoothing=float(numbers["alpha"]), clip=False)
    taus = coefficients(coefficient, numbers["loss_curr"], numbers["loss_last"], is_first=lambda epoch: epoch == 0)
    assert taus[0] == 0
    np.testing.assert_allclose(taus, numbers["tau"], **DOUBLE)


def coefficients(coefficient, losses, old_losses, is_first):
    """The smoothed coefficient after each epoch, from the losses of its pass."""
    state = coefficient.init(jnp.zeros(1, losses.dtype))
    taus = []
    for epoch, pair in enumerate(zip(losses, old_losses, strict=True)):
        state = state.refreshed(*map(jnp.asarray, pair), jnp.asarray(is_first(epoch)))
        taus.append(state.correlation)
    return np.asarray(taus)


def test_coefficient_through_refresh(x64, golden):
    """The same numbers when `refresh` evaluates the losses, at the parameters and at the snapshot."""
    numbers = golden("corr_coef_itop")
    tx = agent_optax.correct_gradients(
        coefficient=agent_optax.loss_regression(initial=float(numbers["tau_start"]), clip=False)
    )

    def loss_fn(place, batch):
        """The first of two given losses at place 0, the second at place 1."""
        return (1 - place) * batch[0] + place * batch[1]

    places = [jnp.asarray(float(place % 2)) for place in range(len(numbers["tau"]) + 1)]  # the snapshot's, then each
    opt_state = tx.init(places[0])
    opt_state = agent_optax.refresh(loss_fn, places[0], opt_state, np.ones((1, 2)))  # the first pass gives no estimate
    for epoch, expected in enumerate(numbers["tau"]):
        pairs = np.stack([numbers["loss_curr"][epoch], numbers["loss_last"][epoch]], axis=1)
        here = places[epoch + 1]
        opt_state = agent_optax.refresh(loss_fn, here, opt_state, pairs[:, ::-1] if here == 1 else pairs)
        np.testing.assert_allclose(agent_optax.diagnostics(opt_state)["correlation"], expected, **DOUBLE)


# Whole runs. Weights have PyTorch's layout, (out, in).


def mlp_loss(params, batch):
    """20-16-5, relu; batch normalisation before it if there are parameters for it. Also returns the statistics."""
    x, y = batch
    x = x @ params["fc0_weight"].T + params["fc0_bias"]
    statistics = ()
    if "bn0_weight" in params:
        statistics = (x.mean(0), x.var(0, ddof=1))
        x = (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5) * params["bn0_weight"] + params["bn0_bias"]
    logits = jax.nn.relu(x) @ params["fc1_weight"].T + params["fc1_bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), statistics


def published_hyperparameters(numbers):
    names = ("learning_rate", "momentum", "weight_decay", "scaling", "smoothing")
    return dict(zip(names, numbers["hyper"].tolist(), strict=True))


def unclipped_agent(learning_rate, momentum, weight_decay, scaling, smoothing):
    """The chain that `agent` is, with the published code's unclipped coefficient."""
    return optax.chain(
        agent_optax.correct_gradients(
            memory=agent_optax.snapshot(),
            coefficient=agent_optax.loss_regression(smoothing=smoothing, clip=False),
            scaling=scaling,
        ),
        optax.add_decayed_weights(weight_decay),
        optax.sgd(learning_rate, momentum=momentum, nesterov=True),
    )


def epochs(tx, numbers):
    """Trains as Algorithm 1 does; yields what the golden files record, after each epoch."""
    names = [name.removeprefix("init_") for name in numbers if name.startswith("init_")]
    params = {name: jnp.asarray(numbers[f"init_{name}"]) for name in names}
    x, y = numbers["X"], numbers["y"]
    opt_state = tx.init(params)
    grads_fn = agent_optax.value_and_grads(mlp_loss, has_aux=True)

    @jit
    def step(params, opt_state, batch):
        ((value, statistics), grads), extras = grads_fn(params, opt_state, batch)
        updates, opt_state = tx.update(grads, opt_state, params, **extras)
        return optax.apply_updates(params, updates), opt_state, value, statistics

    for anchor, update in zip(numbers["idx_anchor"], numbers["idx_update"], strict=True):
        start = params
        opt_state = agent_optax.refresh(mlp_loss, params, opt_state, (x[anchor], y[anchor]), has_aux=True)
        mean_grads = optax.tree.get(opt_state, "mean_grads")
        losses, statistics = [], []
        for samples in update:
            params, opt_state, value, seen = step(params, opt_state, (x[samples], y[samples]))
            losses.append(value)
            statistics.append(seen)
        yield {
            "start": start,
            "params": params,
            "mean_grads": mean_grads,
            "tau": agent_optax.diagnostics(opt_state)["correlation"],
            "losses": losses,
            "statistics": statistics,
        }


@pytest.mark.parametrize("name", ["e2e_dense", "e2e_bn"])
def test_training_runs(x64, golden, name):
    """Five epochs of Algorithm 1: every parameter after every epoch, every loss, every coefficient."""
    numbers = golden(name)
    tx = unclipped_agent(**published_hyperparameters(numbers))
    for epoch, record in enumerate(epochs(tx, numbers)):
        np.testing.assert_allclose(record["tau"], numbers["alg1_tau"][epoch], **DOUBLE)
        np.testing.assert_allclose(record["losses"], numbers["alg1_loss"][epoch], **DOUBLE)
        for leaf, values in record["params"].items():
            num_batches = len(numbers["idx_anchor"][epoch])
            np.testing.assert_allclose(values, numbers[f"alg1_p_{leaf}"][epoch], **DOUBLE)
            np.testing.assert_allclose(
                record["mean_grads"][leaf], numbers[f"alg1_u_sum_{leaf}"][epoch] / num_batches, **DOUBLE
            )
    assert epoch == 4


def test_agent_is_the_published_run_until_an_estimate_leaves_the_unit_interval(x64, golden):
    """`agent` clips the estimates, as the paper has it; the published code does not, and first exceeds 1 in epoch 3."""
    numbers = golden("e2e_bn")
    clipped = numbers["alg1_tau_curr"] > 1 + 1e-9  # in epoch 0 new and old losses are the same, and the estimate is 1
    assert clipped.tolist() == [False, False, False, True, True]
    tx = agent_optax.agent(nesterov=True, **published_hyperparameters(numbers))
    for epoch, record in enumerate(epochs(tx, numbers)):
        if clipped[epoch]:
            before = numbers["alg1_tau"][epoch - 1]
            np.testing.assert_allclose(record["tau"], 0.7 * before + 0.3, **DOUBLE)
            break
        np.testing.assert_allclose(record["tau"], numbers["alg1_tau"][epoch], **DOUBLE)
        np.testing.assert_allclose(record["losses"], numbers["alg1_loss"][epoch], **DOUBLE)
        for leaf, values in record["params"].items():
            np.testing.assert_allclose(values, numbers[f"alg1_p_{leaf}"][epoch], **DOUBLE)
    assert epoch == 3


def test_running_statistics_of_batch_normalisation(x64, golden):
    """The published code updates running statistics in the refresh pass too; with that pass added they agree.

    So the statistics that training hands back are those of the current parameters, never of the snapshot.
    """
    numbers = golden("e2e_bn")
    x, y = numbers["X"], numbers["y"]
    mean, var = np.zeros(16), np.ones(16)
    tx = unclipped_agent(**published_hyperparameters(numbers))
    loss = jit(mlp_loss)
    for epoch, record in enumerate(epochs(tx, numbers)):
        anchor = [loss(record["start"], (x[samples], y[samples]))[1] for samples in numbers["idx_anchor"][epoch]]
        for batch_mean, batch_var in anchor + record["statistics"]:
            mean, var = 0.9 * mean + 0.1 * batch_mean, 0.9 * var + 0.1 * batch_var
        np.testing.assert_allclose(mean, numbers["alg1_bn0_running_mean"][epoch], **DOUBLE)
        np.testing.assert_allclose(var, numbers["alg1_bn0_running_var"][epoch], **DOUBLE)
    assert epoch == 4
