"""One training loop, written for NNX, for Linen and for bare JAX, gives identical numbers."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import agent_optax
import agent_optax.flax

NUM_BATCHES, EPOCHS = 6, 2


class NNXModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(5, 12, rngs=rngs)
        self.output = nnx.Linear(12, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.output(nnx.relu(self.hidden(x)))


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(3, name="output")(nn.relu(nn.Dense(12, name="hidden")(x)))


def bare_model(params: Any, x: jax.Array) -> jax.Array:
    x = jax.nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return x @ params["output"]["kernel"] + params["output"]["bias"]


def all_batches() -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(NUM_BATCHES, 8, 5)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(np.argmax(x[..., :3], axis=-1))


def batch_of(index: int) -> tuple[jax.Array, jax.Array]:
    return jax.tree.map(lambda x: x[index], all_batches())


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def snapshot_sgd() -> Any:
    correction = agent_optax.correct_gradients(coefficient=agent_optax.gradient_regression(), scaling=1.0)
    return optax.chain(correction, optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9, nesterov=True))


def table_adam() -> Any:
    return optax.chain(agent_optax.correct_gradients(agent_optax.table(NUM_BATCHES), scaling=1.0), optax.adam(0.01))


OPTIMIZERS = {
    "compact-snapshot": lambda: agent_optax.sparsify(
        snapshot_sgd(), agent_optax.rigl(update_every=4), sparsity=0.5, storage="compact"
    ),
    "dense-table": lambda: agent_optax.sparsify(table_adam(), agent_optax.set_(update_every=4), sparsity=0.5),
}


def train_bare(tx: Any, params: Any, has_snapshot: bool) -> Any:
    def loss_fn(params: Any, batch: Any) -> jax.Array:
        return cross_entropy(bare_model(params, batch[0]), batch[1])

    grads_fn = agent_optax.value_and_grads(loss_fn)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, opt_state: Any, batch: Any, index: Any) -> Any:
        (value, grads), extras = grads_fn(params, opt_state, batch)
        updates, opt_state = tx.update(grads, opt_state, params, batch_index=index, **extras)
        return optax.apply_updates(params, updates), opt_state, value

    opt_state, values = tx.init(params), []
    params = agent_optax.mask_params(params, opt_state)
    for _ in range(EPOCHS):
        if has_snapshot:
            opt_state = agent_optax.refresh(loss_fn, params, opt_state, all_batches())
        for i in range(NUM_BATCHES):
            params, opt_state, value = step(params, opt_state, batch_of(i), i)
            values.append(value)
    return params, jax.tree.leaves(opt_state), values


def train_linen(tx: Any, params: Any, has_snapshot: bool) -> Any:
    model = LinenModel()

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        return cross_entropy(model.apply({"params": params}, batch[0]), batch[1])

    grads_fn = agent_optax.value_and_grads(loss_fn)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, batch: Any, index: Any) -> Any:
        (value, grads), extras = grads_fn(state.params, state.opt_state, batch)
        return state.apply_gradients(grads=grads, batch_index=index, **extras), value

    state, values = agent_optax.flax.linen.TrainState.create(apply_fn=model.apply, params=params, tx=tx), []
    for _ in range(EPOCHS):
        if has_snapshot:
            opt_state = agent_optax.refresh(loss_fn, state.params, state.opt_state, all_batches())
            state = state.replace(opt_state=opt_state)
        for i in range(NUM_BATCHES):
            state, value = step(state, batch_of(i), i)
            values.append(value)
    assert int(state.step) == len(values)
    return state.params, jax.tree.leaves(state.opt_state), values


def train_nnx(tx: Any, params: Any, has_snapshot: bool) -> Any:
    model = NNXModel(nnx.Rngs(7))
    nnx.update(model, params)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def loss_fn(model: NNXModel, batch: Any) -> jax.Array:
        return cross_entropy(model(batch[0]), batch[1])

    grads_fn = agent_optax.flax.nnx.value_and_grads(loss_fn)
    num_traced = 0

    @functools.partial(nnx.jit, donate_argnums=(0, 1))
    def step(model: NNXModel, optimizer: nnx.Optimizer, batch: Any, index: Any) -> jax.Array:
        nonlocal num_traced
        num_traced += 1
        (value, grads), extras = grads_fn(model, optimizer, batch)
        optimizer.update(model, grads, batch_index=index, **extras)
        return value

    values = []
    agent_optax.flax.nnx.mask_model(model, optimizer)
    for _ in range(EPOCHS):
        if has_snapshot:
            agent_optax.flax.nnx.refresh(loss_fn, model, optimizer, all_batches())
        for i in range(NUM_BATCHES):
            values.append(step(model, optimizer, batch_of(i), i))
    assert num_traced == 1
    trained = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return trained, jax.tree.leaves(agent_optax.flax.nnx.opt_state(optimizer)), values


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_same_numbers(name: str) -> None:
    has_snapshot = "table" not in name
    params = LinenModel().init(jax.random.key(0), jnp.ones((1, 5)))["params"]
    runs = [
        train(OPTIMIZERS[name](), jax.tree.map(jnp.copy, params), has_snapshot)
        for train in (train_bare, train_linen, train_nnx)
    ]
    (bare, bare_state, values), *others = runs
    assert float(values[-1]) < float(values[0])
    assert not np.array_equal(bare["hidden"]["kernel"], params["hidden"]["kernel"])
    for other, other_state, other_values in others:
        np.testing.assert_array_equal(values, other_values)
        assert jax.tree.structure(other) == jax.tree.structure(bare)
        jax.tree.map(np.testing.assert_array_equal, other, bare)
        assert len(other_state) == len(bare_state)
        for ours, theirs in zip(bare_state, other_state, strict=True):
            np.testing.assert_array_equal(ours, theirs)
