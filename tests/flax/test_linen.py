"""The train state for Linen: extra arguments go on to the optimizer, and sparse parameters start sparse."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state

import agent_optax
import agent_optax.flax

BATCHES = jax.random.normal(jax.random.key(2), (5, 16, 6))


class Model(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.BatchNorm(use_running_average=False)(nn.Dense(8)(x))
        return nn.Dense(1)(nn.relu(nn.Dropout(0.25, deterministic=False)(x)))


class TrainState(agent_optax.flax.linen.TrainState):
    batch_stats: Any


def loss_fn(params: Any, batch: jax.Array, batch_stats: Any, key: jax.Array) -> Any:
    variables = {"params": params, "batch_stats": batch_stats}
    output, changed = Model().apply(variables, batch, rngs={"dropout": key}, mutable=["batch_stats"])
    return jnp.mean((output - jnp.sin(batch[:, :1])) ** 2), changed["batch_stats"]


def start(tx: Any) -> TrainState:
    rngs = dict(zip(("params", "dropout"), jax.random.split(jax.random.key(0)), strict=True))
    variables = Model().init(rngs, BATCHES[0])
    return TrainState.create(
        apply_fn=Model().apply, params=variables["params"], batch_stats=variables["batch_stats"], tx=tx
    )


def test_batch_statistics_are_those_of_the_first_evaluation() -> None:
    tx = agent_optax.sparsify(agent_optax.agent(0.1), agent_optax.rigl(update_every=2), sparsity=0.5, storage="compact")
    state = start(tx)
    assert int(sum((np.asarray(layer["kernel"]) != 0).sum() for layer in kernels(state))) == 28  # half of 48 + 8

    @jax.jit
    def step(state: TrainState, batch: jax.Array) -> tuple[TrainState, jax.Array]:
        grads_fn = agent_optax.value_and_grads(loss_fn, has_aux=True)
        key = jax.random.fold_in(jax.random.key(7), state.step)
        ((value, batch_stats), grads), extras = grads_fn(state.params, state.opt_state, batch, state.batch_stats, key)
        return state.apply_gradients(grads=grads, batch_stats=batch_stats, **extras), value

    expected_stats = start(tx).batch_stats
    for epoch in range(2):
        args = (state.batch_stats, jax.random.key(epoch))
        opt_state = agent_optax.refresh(loss_fn, state.params, state.opt_state, BATCHES, has_aux=True, args=args)
        state = state.replace(opt_state=opt_state)
        for batch in BATCHES:
            key = jax.random.fold_in(jax.random.key(7), state.step)
            _, expected_stats = loss_fn(state.params, batch, expected_stats, key)
            state, _ = step(state, batch)
    assert int(state.step) == 10
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.batch_stats, expected_stats)
    assert float(agent_optax.diagnostics(state.opt_state)["correlation"]) > 0
    assert int(agent_optax.diagnostics(state.opt_state)["num_topology_updates"]) == 5


def kernels(state: TrainState) -> list[Any]:
    return [layer for name, layer in state.params.items() if name.startswith("Dense")]


def test_without_correction_or_sparsity_it_is_that_of_flax() -> None:
    arguments = {"apply_fn": None, "params": {"kernel": jnp.ones((3, 2))}, "tx": optax.adam(0.1)}
    ours, theirs = agent_optax.flax.linen.TrainState.create(**arguments), train_state.TrainState.create(**arguments)
    for _ in range(3):
        ours, theirs = (s.apply_gradients(grads={"kernel": jnp.arange(6.0).reshape(3, 2)}) for s in (ours, theirs))
    assert ours.step == theirs.step == 3
    np.testing.assert_array_equal(ours.params["kernel"], theirs.params["kernel"])
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'old_grads'"):
        theirs.apply_gradients(grads=theirs.params, old_grads=theirs.params)  # why ours exists


def test_scales_of_8_bit_layers_are_overwritten() -> None:
    inner = optax.chain(agent_optax.correct_gradients(), optax.sgd(0.1))
    tx = agent_optax.sparsify(inner, agent_optax.static(), sparsity=0.5)
    params = {"params": {"kernel": jnp.ones((4, 4))}, OVERWRITE_WITH_GRADIENT: {"scale": jnp.ones(2)}}
    state = agent_optax.flax.linen.TrainState.create(apply_fn=None, params=params, tx=tx)
    assert float(state.params["params"]["kernel"].sum()) == 8
    grads = jax.tree.map(lambda p: 0.5 * jnp.ones_like(p), params)
    state = state.apply_gradients(grads=grads, old_grads=grads)
    np.testing.assert_array_equal(state.params[OVERWRITE_WITH_GRADIENT]["scale"], [0.5, 0.5])
    assert float(state.params["params"]["kernel"].sum()) == pytest.approx(8 * 0.95)
