# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Reading the diagnostics: when to switch correction off
#
# Correction takes a second gradient at each step and a pass over the data at each refresh. Is it worth that, here and
# now? Two sources of numbers answer:
#
# - `agent_optax.diagnostics(opt_state)`: running estimates that the optimizer makes anyway. They cost nothing, and are
#   there at every step.
# - `agent_optax.analysis`: exact measurements over all batches, at one point of training. They cost two passes.
#
# The network is 80% sparse, on a fixed random mask.

# %%
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
order = np.random.default_rng(0).permutation(len(images))[:1280]
batches = (
    jnp.asarray(images[order], jnp.float32).reshape(40, 32, 64),  # 40 batches of 32 images of 64 pixels
    jnp.asarray(labels[order]).reshape(40, 32),
)


def init_params(key):
    shapes = {"hidden": (64, 100), "output": (100, 10)}
    keys = jax.random.split(key, len(shapes))
    kernel = jax.nn.initializers.he_normal()
    return {
        name: {"kernel": kernel(keys[i], shape), "bias": jnp.zeros(shape[1])}
        for i, (name, shape) in enumerate(shapes.items())
    }


def loss_fn(params, batch):
    hidden = jax.nn.relu(batch[0] @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    logits = hidden @ params["output"]["kernel"] + params["output"]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


sgd = optax.sgd(0.1, momentum=0.9, nesterov=True)
correction = agent_optax.correct_gradients(agent_optax.snapshot(), agent_optax.gradient_regression(), scaling=1.0)
tx = agent_optax.sparsify(optax.chain(correction, sgd), agent_optax.static(), sparsity=0.8)
params = init_params(jax.random.key(1))
opt_state = tx.init(params)
params = agent_optax.mask_params(params, opt_state)

# %% [markdown]
# ## Both, epoch by epoch
#
# After each epoch, just before the snapshot moves, the exact numbers: the correlation of the two gradients over
# batches, the best weight (equation 3), and what that leaves of the variance. `masks=` counts the gradients of active
# weights only. Beside them, at each step, the running estimates.


# %%
@jax.jit
def train_epoch(params, opt_state, key):
    opt_state = agent_optax.refresh(loss_fn, params, opt_state, batches)
    shuffled = jax.tree.map(lambda x: x[jax.random.permutation(key, len(x))], batches)

    def step(carry, batch):
        params, opt_state = carry
        (_, grads), extras = agent_optax.value_and_grads(loss_fn)(params, opt_state, batch)
        updates, opt_state = tx.update(grads, opt_state, params, **extras)
        return (optax.apply_updates(params, updates), opt_state), agent_optax.diagnostics(opt_state)

    (params, opt_state), reports = jax.lax.scan(step, (params, opt_state), shuffled)
    return params, opt_state, reports


@jax.jit
def measure(params, opt_state):
    old_params = agent_optax.snapshot_params(opt_state, params)
    masks = agent_optax.active_masks(opt_state, params)
    return (
        analysis.gradient_correlation(loss_fn, params, old_params, batches, masks=masks),
        analysis.optimal_coefficient(loss_fn, params, old_params, batches, masks=masks),
    )


num_epochs, running, exact = 8, [], []
for epoch in range(num_epochs):
    params, opt_state, reports = train_epoch(params, opt_state, jax.random.key(epoch))
    running.append(jax.device_get(reports))
    exact.append(jax.device_get(measure(params, opt_state)))

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
steps = np.arange(num_epochs * 40) / 40
ends = np.arange(1, num_epochs + 1)
axes[0].plot(ends, [float(gradients.correlation) for gradients, _ in exact], "o-")
axes[0].set(title="correlation of new and old gradient", xlabel="epoch", ylim=(0, 1))
axes[1].plot(steps, np.concatenate([reports["correlation"] for reports in running]), label="diagnostics, each step")
axes[1].plot(ends, [float(best.optimal) for _, best in exact], "o", label="exact, at the end of the epoch")
axes[1].set(title="weight $c$", xlabel="epoch")
axes[2].plot(steps, np.concatenate([reports["variance_ratio"] for reports in running]), label="diagnostics, each step")
axes[2].plot(ends, [float(best.optimal_variance_ratio) for _, best in exact], "o", label="exact, at the best weight")
axes[2].axhline(1, color="grey", linewidth=0.8)
axes[2].axhline(1 / 3, color="C3", linestyle=":", label="a batch three times as large")
axes[2].set(title="variance left", xlabel="epoch", ylim=(0, 1.2))
for axis in axes[1:]:
    axis.legend(fontsize=8)

# %% [markdown]
# How to read it:
#
# - **Each refresh starts at weight 1.** The snapshot *is* the weights of now, the two gradients are equal, and what is
#   left is the mean gradient. As the weights move away the gradients grow apart, the weight falls, and the variance
#   comes back. The jagged line is that.
# - **The running estimate trails the exact one.** It averages over the steps since the refresh, in the first of which
#   the two gradients were closer than they are at the end of the epoch.
# - **The first epochs are the worst.** The weights move fastest then.
#
# ## What it should be compared with
#
# With a second gradient at each step and a pass at each refresh, an epoch takes three gradients a sample in place of
# one. As many gradients would also pay for batches three times as large, which leave a third of the variance. So,
# gradient for gradient, correction can be worth it only where the variance left is under $1/3$; under $1/2$ with
# `snapshot(cached_batches=N)`, which needs no second gradient; and under 1 with `table(N)`, which takes no more
# gradients than SGD. The mean of the running estimate over an epoch is the number to hold against that.

# %%
left = np.array([np.mean(r["variance_ratio"], where=r["variance_ratio_known"]) for r in running])
for epoch, ratio in enumerate(left, start=1):
    print(f"epoch {epoch}: {ratio:.2f} of the variance left, {'less' if ratio < 1 / 3 else 'more'} than a third")

# %% [markdown]
# Variance is not accuracy: this is a condition, not a promise. In the comparison of the README batches three times as
# large did better than the correction at equal gradients. And where the noise of gradients is not what limits
# training (a small learning rate, large batches, the last epochs of a decayed rate, an average of the weights),
# taking it off gains little, however well it is taken off.
#
# ## A mean gradient that is not the mean
#
# The weights above assume that $g_{old} - g_{mean}$ is zero on average. It is not when the refresh pass sees a
# sub-sample, or clean images where training sees attacked ones. `analysis.estimator_error` measures what the optimizer
# would then really do: variance and squared bias, both relative to the variance of the raw gradient.

# %%
refreshes = {"all batches": batches, "4 of 40 batches": jax.tree.map(lambda x: x[:4], batches)}
for name, sample in refreshes.items():
    refreshed = agent_optax.refresh(loss_fn, params, opt_state, sample)
    error = analysis.estimator_error(loss_fn, params, refreshed, batches)
    print(f"{name}: error {error.error_ratio:.3f} = variance {error.variance_ratio:.3f} + bias {error.bias_ratio:.3f}")

# %% [markdown]
# Right after a refresh on all batches nothing is left. On a tenth of them the variance is as small, and a bias
# stays, the noise of the mean of four batches: it does not average out over the steps until the next refresh.
#
# ## Switching it off
#
# When the numbers say so, go on without: the state of the rest of the chain is kept, only the part of the correction is
# taken out. Here with `storage="dense"`, where the inner state of `sparsify` is that of the chain.

# %%
plain_tx = agent_optax.sparsify(optax.chain(sgd), agent_optax.static(), sparsity=0.8)
plain_state = opt_state._replace(inner_state=opt_state.inner_state[1:])


@jax.jit
def plain_step(params, opt_state, batch):
    value, grads = jax.value_and_grad(loss_fn)(params, batch)
    updates, opt_state = plain_tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value


before = float(jax.vmap(loss_fn, in_axes=(None, 0))(params, batches).mean())
plain_params = params
for batch in zip(*batches, strict=True):
    plain_params, plain_state, value = plain_step(plain_params, plain_state, batch)
after = float(jax.vmap(loss_fn, in_axes=(None, 0))(plain_params, batches).mean())
print(f"training loss {before:.4f}, after an epoch without correction {after:.4f}")

# %% [markdown]
# To make it fade out instead of stopping, use `scheduled` as the coefficient, with any Optax schedule, as
# `agent_optax.alpha_svrg` does; the second gradient is evaluated all the same.

# %%
assert all(0 < float(best.optimal_variance_ratio) <= 1 for _, best in exact)
assert error.bias_ratio > 1e-3
assert float(agent_optax.diagnostics(plain_state)["sparsity"]) == float(agent_optax.diagnostics(opt_state)["sparsity"])
assert after < 1.5 * before
