# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Sparse training from scratch: RigL-ITOP with AGENT
#
# A network of which 95% of the weights are zero, from the first step to the last. Which 5% are not is learned too:
# now and then the smallest active weights are dropped, and as many are grown where the gradient is largest (RigL).
# With long intervals and a share of dropped weights that falls over training this is ITOP: *in-time
# over-parameterisation*, because over time many more weights have their turn than are ever active at once. That share
# is called $R_s$.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import agent_optax

images, labels = load_digits(return_X_y=True)
images = (images - images.mean()) / images.std()
order = np.random.default_rng(0).permutation(len(images))
train, test = order[:1280], order[1280:]
batches = (
    jnp.asarray(images[train], jnp.float32).reshape(40, 32, 64),  # 40 batches of 32 images of 64 pixels
    jnp.asarray(labels[train]).reshape(40, 32),
)
test_batch = jnp.asarray(images[test], jnp.float32), jnp.asarray(labels[test])


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


# %% [markdown]
# ## The optimizer
#
# Inside, what would train a dense network: corrected gradients, weight decay, momentum. Around it `sparsify`, which
# makes any Optax optimizer sparse. `mask_params` sets the inactive weights to zero before the first step; after that,
# `optax.apply_updates` keeps them there, and nothing else has to be called. A paper's interval of 1,500 steps is for
# runs of 100,000; this one has 480, and an interval of 20.

# %%
num_epochs, num_batches = 12, 40
num_steps = num_epochs * num_batches
dense_tx = optax.chain(
    agent_optax.correct_gradients(agent_optax.snapshot(), agent_optax.gradient_regression(), scaling=1.0),
    optax.add_decayed_weights(5e-4),
    optax.sgd(0.05, momentum=0.9, nesterov=True),
)
topology = agent_optax.rigl_itop(total_steps=num_steps, update_every=20)
tx = agent_optax.sparsify(dense_tx, topology, sparsity=0.95, key=0)

params = init_params(jax.random.key(1))
opt_state = tx.init(params)
params = agent_optax.mask_params(params, opt_state)


# %%
@jax.jit
def train_epoch(params, opt_state, key):
    opt_state = agent_optax.refresh(loss_fn, params, opt_state, batches)
    shuffled = jax.tree.map(lambda x: x[jax.random.permutation(key, len(x))], batches)

    def step(carry, batch):
        params, opt_state = carry
        (value, grads), extras = agent_optax.value_and_grads(loss_fn)(params, opt_state, batch)
        updates, opt_state = tx.update(grads, opt_state, params, **extras)
        return (optax.apply_updates(params, updates), opt_state), value

    (params, opt_state), values = jax.lax.scan(step, (params, opt_state), shuffled)
    correct = jnp.argmax(logits(params, test_batch[0]), axis=-1) == test_batch[1]
    return params, opt_state, (values.mean(), correct.mean())


def hidden_mask(opt_state, params):
    return np.asarray(agent_optax.active_masks(opt_state, params)["hidden"]["kernel"])


masks, reports, curve = [hidden_mask(opt_state, params)], [agent_optax.diagnostics(opt_state)], []
for epoch in range(num_epochs):
    params, opt_state, (loss, accuracy) = train_epoch(params, opt_state, jax.random.key(epoch))
    masks.append(hidden_mask(opt_state, params))
    reports.append(agent_optax.diagnostics(opt_state))
    curve.append((float(loss), float(accuracy)))
print(f"test accuracy {100 * curve[-1][1]:.1f}% with {100 * (1 - reports[-1]['sparsity']):.1f}% of the weights")

# %% [markdown]
# ## How the masks evolve
#
# Each picture is the first layer's mask: 64 pixels from top to bottom, 100 hidden units from left to right. At first
# the connections are random; RigL moves them to where the gradient asks for them, which is to a few hidden units: those
# that the output layer listens to. Pixels at the border of the images are always blank: no gradient ever reaches their
# rows, and nothing new grows there.

# %%
shown = [0, 1, 4, num_epochs]
figure, axes = plt.subplots(1, len(shown), figsize=(11, 2.4), layout="constrained", sharey=True)
for axis, epoch in zip(axes, shown, strict=True):
    axis.imshow(masks[epoch], cmap="gray_r", interpolation="nearest", aspect="auto")
    axis.set(title=f"after epoch {epoch}", xlabel="hidden unit")
axes[0].set_ylabel("pixel")

# %% [markdown]
# Summed over hidden units and laid out as an image: how many connections each pixel has. They gather where digits have
# their ink.

# %%
figure, axes = plt.subplots(1, len(shown) + 1, figsize=(11, 2.4), layout="constrained")
most = max(masks[epoch].sum(axis=1).max() for epoch in shown)
for axis, epoch in zip(axes, shown, strict=False):
    axis.imshow(masks[epoch].sum(axis=1).reshape(8, 8), cmap="viridis", vmin=0, vmax=most)
    axis.set(title=f"after epoch {epoch}", xticks=[], yticks=[])
axes[-1].imshow(images[train].std(axis=0).reshape(8, 8), cmap="magma")
axes[-1].set(title="spread of the pixels", xticks=[], yticks=[])

# %% [markdown]
# ## How much was explored
#
# The number of active weights never changes; the share that was ever active, $R_s$, grows with each topology update,
# and more slowly as the share of dropped weights falls. ITOP's observation is that sparse training does well when
# $R_s$ is large. `analysis.sparsity_summary` says the same layer by layer.

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.0), layout="constrained")
epochs = np.arange(num_epochs + 1)
axes[0].plot(epochs, [100 * float(report["exploration_rate"]) for report in reports], label="ever active, $R_s$")
axes[0].plot(epochs, [100 * (1 - float(report["sparsity"])) for report in reports], label="active")
axes[0].set(title="share of the weights, %", xlabel="epoch", ylim=(0, None))
axes[0].legend()
axes[1].step(epochs[1:], [int(report["num_grown"]) for report in reports[1:]], where="mid")
axes[1].set(title="grown in the epoch's last update", xlabel="epoch", ylim=(0, None))
axes[2].plot(epochs[1:], [100 * accuracy for _, accuracy in curve])
axes[2].set(title="test accuracy, %", xlabel="epoch")

# %%
print(agent_optax.analysis.sparsity_summary(params, opt_state))

# %% [markdown]
# ## What to change
#
# - `agent_optax.set_itop(...)` grows at random, and needs no dense gradient to choose.
# - `storage="compact"` keeps momentum, snapshot and mean gradient of the active weights only.
# - `agent_optax.agent(0.05)` in place of `dense_tx` is the paper's optimizer.

# %%
active = [int(mask.sum()) for mask in masks]
explored = [float(report["exploration_rate"]) for report in reports]
assert len(set(active)) == 1
assert explored == sorted(explored)
assert explored[-1] > 2 * explored[0]
assert int(np.count_nonzero(np.asarray(params["hidden"]["kernel"])[~masks[-1]])) == 0
assert curve[-1][1] > 0.85
