"""Sparse layers train as dense kernels under `sparsify` with the same masks do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from layers_of_each_kind import connect

import agent_optax
from agent_optax import layers

OPTIMIZERS = {
    "momentum": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adamw": lambda: optax.adamw(0.01),
    "svrg": lambda: agent_optax.svrg(0.1, momentum=0.9),
}
X = jax.random.normal(jax.random.key(0), (4, 8, 12))
Y = jnp.sin(X[..., :1] * X[..., 1:2])


def train(tx, params, apply, refresh, mask=False):
    """Ten steps, with a refresh of the snapshot where there is one."""

    def loss_fn(params, batch):
        x, y = batch
        return jnp.mean((apply(params, x) - y) ** 2)

    opt_state = tx.init(params)
    params = agent_optax.mask_params(params, opt_state) if mask else params

    @jax.jit
    def step(params, opt_state, batch):
        (_, grads), extras = agent_optax.value_and_grads(loss_fn)(params, opt_state, batch)
        updates, opt_state = tx.update(grads, opt_state, params, **extras)
        return optax.apply_updates(params, updates), opt_state

    for t in range(10):
        if t % 5 == 0 and refresh:
            opt_state = agent_optax.refresh(loss_fn, params, opt_state, (X, Y))
        params, opt_state = step(params, opt_state, (X[t % 4], Y[t % 4]))
    return params


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["fan_in:16", "fan_in:1", "any_mask"])
def test_ten_steps_are_those_of_sparsify(kind, name):
    connections = [connect(kind, 12, 20), connect(kind, 20, 16, seed=1)]
    values = [layers.init_values(jax.random.key(i), c) for i, c in enumerate(connections)]
    output = jax.random.normal(jax.random.key(2), (16, 1)) / 4

    def apply(params, x, dot):
        for i in range(2):
            x = jnp.tanh(dot(x, params[f"hidden_{i}"]["kernel"], i))
        return x @ params["output"]["kernel"]

    def start(hidden):
        kernels = {f"hidden_{i}": {"kernel": h} for i, h in enumerate(hidden)}
        return {**kernels, "output": {"kernel": output}}

    sparse = train(
        OPTIMIZERS[name](),
        start(values),
        lambda p, x: apply(p, x, lambda x, v, i: layers.sparse_dot(x, v, connections[i])),
        refresh=name == "svrg",
    )
    masks = {f"hidden_{i}": {"kernel": c.mask()} for i, c in enumerate(connections)}
    tx = agent_optax.sparsify(OPTIMIZERS[name](), agent_optax.static(), masks={**masks, "output": {"kernel": None}})
    dense = train(
        tx,
        start([layers.to_dense(v, c) for v, c in zip(values, connections, strict=True)]),
        lambda p, x: apply(p, x, lambda x, w, i: x @ w),
        refresh=name == "svrg",
        mask=True,
    )
    for i, c in enumerate(connections):
        trained = sparse[f"hidden_{i}"]["kernel"]
        np.testing.assert_allclose(layers.to_dense(trained, c), dense[f"hidden_{i}"]["kernel"], rtol=1e-4, atol=1e-5)
        assert float(jnp.abs(trained - values[i]).max()) > 0.01
    np.testing.assert_allclose(sparse["output"]["kernel"], dense["output"]["kernel"], rtol=1e-4, atol=1e-5)
