# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A first look: what the correction does
#
# A minibatch gradient is the true gradient plus noise. AGENT subtracts a part of that noise, which it estimates with an
# older gradient of the same batch:
#
# $$\hat g = g_{new} - w\,(g_{old} - g_{mean})$$
#
# - $g_{new}$ is the gradient of the batch at the weights of now;
# - $g_{old}$ is the gradient of the same batch at a *snapshot*, the weights as they were when the epoch began;
# - $g_{mean}$ is the gradient at the snapshot, averaged over all training data.
#
# The difference $g_{old} - g_{mean}$ is the noise of this batch at the snapshot. As far as the noise of now is like it,
# a part $w$ of it can be taken off; on average over batches it is zero, so nothing is distorted.
#
# Here a small dense network is trained on handwritten digits, once with SGD and once with the correction.

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import agent_optax
from agent_optax import analysis

images, labels = load_digits(return_X_y=True)
images = (images - images.mean()) / images.std()
order = np.random.default_rng(0).permutation(len(images))
train, test = order[:1280], order[1280:]
batches = (
    jnp.asarray(images[train], jnp.float32).reshape(40, 32, 64),  # 40 batches of 32 images of 64 pixels
    jnp.asarray(labels[train]).reshape(40, 32),
)
test_batch = jnp.asarray(images[test], jnp.float32), jnp.asarray(labels[test])


# %%
def init_params(key):
    shapes = {"hidden": (64, 100), "output": (100, 10)}
    keys = jax.random.split(key, len(shapes))
    kernel = jax.nn.initializers.he_normal()
    return {
        name: {"kernel": kernel(keys[i], shape), "bias": jnp.zeros(shape[1])}
        for i, (name, shape) in enumerate(shapes.items())
    }


def logits(params, inputs):
    hidden = jax.nn.relu(inputs @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return hidden @ params["output"]["kernel"] + params["output"]["bias"]


def loss_fn(params, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, batch[0]), batch[1]).mean()


def accuracy(params):
    return jnp.mean(jnp.argmax(logits(params, test_batch[0]), axis=-1) == test_batch[1])


# %% [markdown]
# ## One epoch
#
# Three things differ from an ordinary Optax loop. `value_and_grads` takes the place of `jax.value_and_grad` and also
# evaluates the gradient at the snapshot; what it found goes into `tx.update` as extra arguments; and `refresh` moves
# the snapshot to the weights of now when an epoch begins. An epoch is one `jax.lax.scan` here, which is no more than
# convenient.


# %%
def train_epoch(tx, is_corrected, params, opt_state, key):
    if is_corrected:
        opt_state = agent_optax.refresh(loss_fn, params, opt_state, batches)
    shuffled = jax.tree.map(lambda x: x[jax.random.permutation(key, len(x))], batches)

    def step(carry, batch):
        params, opt_state = carry
        (value, grads), extras = agent_optax.value_and_grads(loss_fn)(params, opt_state, batch)
        updates, opt_state = tx.update(grads, opt_state, params, **extras)
        return (optax.apply_updates(params, updates), opt_state), value

    (params, opt_state), values = jax.lax.scan(step, (params, opt_state), shuffled)
    return params, opt_state, values


# %% [markdown]
# Two optimizers. The weight of the correction is measured while training: *gradient regression* takes, from running
# sums over the steps, the weight that leaves least variance (equation 3 of the paper). `agent_optax.agent(0.05)` would
# be the optimizer as it was published, which estimates the weight from losses and takes a tenth of it.

# %%
sgd = optax.with_extra_args_support(optax.sgd(0.05, momentum=0.9))  # takes the extra arguments and ignores them
corrected = optax.chain(
    agent_optax.correct_gradients(agent_optax.snapshot(), agent_optax.gradient_regression(), scaling=1.0),
    optax.sgd(0.05, momentum=0.9),
)

num_epochs = 8
curves, reports = {}, []
for name, tx in {"SGD": sgd, "corrected": corrected}.items():
    is_corrected = tx is corrected
    params = init_params(jax.random.key(1))
    opt_state = tx.init(params)
    epoch_fn = jax.jit(functools.partial(train_epoch, tx, is_corrected))
    curves[name] = []
    for epoch in range(num_epochs):
        params, opt_state, values = epoch_fn(params, opt_state, jax.random.key(epoch))
        curves[name].append((float(values.mean()), float(accuracy(params))))
        if is_corrected:
            reports.append(agent_optax.diagnostics(opt_state))

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
epochs = np.arange(1, num_epochs + 1)
for name, curve in curves.items():
    losses, accuracies = zip(*curve, strict=True)
    axes[0].semilogy(epochs, losses, label=name)
    axes[1].plot(epochs, 100 * np.array(accuracies), label=name)
axes[2].plot(epochs, [float(report["correlation"]) for report in reports], color="C1", label="weight $w$")
left = [float(report["variance_ratio"]) if report["variance_ratio_known"] else np.nan for report in reports]
axes[2].plot(epochs, left, color="C2", label="variance left")
for axis, title in zip(axes, ("training loss", "test accuracy, %", "what the correction measures"), strict=True):
    axis.set(title=title, xlabel="epoch")
    axis.legend()

# %% [markdown]
# One seed of a small problem proves nothing about accuracy; the README has the comparison over seeds, with what it
# costs. What this run shows is the right-hand panel: the weight that the optimizer found, and the share of the
# gradient's variance that is left, by the optimizer's own running estimate.
#
# ## The noise itself
#
# `agent_optax.analysis` measures the same exactly, at one point: all 40 batch gradients at the weights of now, and at
# the snapshot of the epoch's beginning.

# %%
old_params = agent_optax.snapshot_params(opt_state, params)
weights = jnp.linspace(0.0, 1.5, 31)
ratios = analysis.variance_ratio(loss_fn, params, old_params, batches, weights)
best = analysis.optimal_coefficient(loss_fn, params, old_params, batches)

figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
axis.plot(weights, ratios)
axis.plot(best.optimal, best.optimal_variance_ratio, "o", label=f"best: w = {best.optimal:.2f}")
axis.axhline(1.0, color="grey", linewidth=0.8)
axis.axvline(0.1, color="C3", linestyle=":", label="w = 0.1, the most that AGENT as published takes")
axis.set(xlabel="weight $w$", ylabel="variance left", title="A parabola in the weight")
axis.legend()

# %% [markdown]
# Left of the parabola's minimum too little noise is taken off, right of it noise of the past is added. At $w = 1$,
# which is SVRG, the correction helps or harms as the two gradients happen to be alike; at the best weight it never
# does worse than none, and that weight is what the optimizer estimates from the steps before.

# %%
assert 0 < float(reports[-1]["correlation"]) <= 1
assert float(best.optimal_variance_ratio) <= float(ratios.min()) + 1e-5 < 1
