"""Compact storage: the same numbers as dense storage, from active entries only."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import agent_optax

OPTIMIZERS = {
    "nesterov": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(0.01),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1, momentum=0.9)),
    "partitioned": lambda: optax.partition(
        {"a": optax.adam(0.01), "b": optax.sgd(0.1, momentum=0.9)}, {"first": "a", "second": "b", "bias": "a"}
    ),
}
TOPOLOGIES = {
    "static": agent_optax.static,
    "set": lambda: agent_optax.set_(update_every=3),
    "rigl": lambda: agent_optax.rigl(update_every=3, drop_fraction=optax.cosine_decay_schedule(0.5, 20)),
}


def make_params(rows: int, columns: int, seed: int) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "first": jax.random.normal(keys[0], (rows, columns)),
        "bias": jnp.ones(columns),
        "second": jax.random.normal(keys[1], (3, columns, 4)),
    }


def loss_fn(params: dict[str, jax.Array], batch: jax.Array) -> jax.Array:
    hidden = jnp.tanh(batch @ params["first"] + params["bias"])
    return jnp.mean(jnp.einsum("bc,kcd->bkd", hidden, params["second"]) ** 2 - hidden.sum(-1)[:, None, None])


def run(tx, params, batches, refresh_at=(), num_steps=10):
    """The parameters after each step, and the last state."""
    opt_state = tx.init(params)
    params = agent_optax.mask_params(params, opt_state)
    grads_fn = agent_optax.value_and_grads(loss_fn)

    @jax.jit
    def step(params, opt_state, batch):
        (_, grads), extras = grads_fn(params, opt_state, batch)
        updates, opt_state = tx.update(grads, opt_state, params, **extras)
        return optax.apply_updates(params, updates), opt_state

    trajectory = []
    for t in range(num_steps):
        if t in refresh_at:
            opt_state = agent_optax.refresh(loss_fn, params, opt_state, batches)
        params, opt_state = step(params, opt_state, batches[t % len(batches)])
        trajectory.append(params)
    return trajectory, opt_state


@pytest.mark.parametrize(
    ("optimizer", "topology"),
    [
        *(("nesterov", topology) for topology in TOPOLOGIES),
        *((optimizer, "rigl") for optimizer in OPTIMIZERS if optimizer != "nesterov"),
    ],
)
def test_dense_and_compact_agree(optimizer: str, topology: str) -> None:
    params = make_params(7, 5, seed=1)
    batches = jax.random.normal(jax.random.key(2), (4, 8, 7))
    sparse = functools.partial(
        agent_optax.sparsify, OPTIMIZERS[optimizer](), TOPOLOGIES[topology](), sparsity=0.6, key=3
    )
    dense, dense_state = run(sparse(storage="dense"), params, batches)
    compact, compact_state = run(sparse(storage="compact"), params, batches)
    chex.assert_trees_all_close(compact, dense, rtol=2e-5, atol=1e-6)
    chex.assert_trees_all_equal(
        agent_optax.active_masks(compact_state, params), agent_optax.active_masks(dense_state, params)
    )
    chex.assert_trees_all_close(agent_optax.diagnostics(compact_state), agent_optax.diagnostics(dense_state))


@settings(max_examples=2)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    sparsity=st.floats(0.0, 0.95),
    seed=st.integers(0, 100),
    optimizer=st.sampled_from(["nesterov", "adam"]),
)
def test_dense_and_compact_agree_on_random_trees(
    rows: int, columns: int, sparsity: float, seed: int, optimizer: str
) -> None:
    params = make_params(rows, columns, seed)
    batches = jax.random.normal(jax.random.key(seed), (2, 4, rows))
    sparse = functools.partial(
        agent_optax.sparsify, OPTIMIZERS[optimizer](), agent_optax.rigl(update_every=2), sparsity=sparsity, key=seed
    )
    dense, _ = run(sparse(storage="dense"), params, batches, num_steps=5)
    compact, _ = run(sparse(storage="compact"), params, batches, num_steps=5)
    chex.assert_trees_all_close(compact, dense, rtol=1e-4, atol=1e-5)


MEMORIES = {
    "snapshot": agent_optax.snapshot,
    "recursion": agent_optax.recursion,
    "history": agent_optax.history,
}


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("coefficient", ["constant", "loss_regression", "gradient_regression"])
def test_corrections_agree_while_nothing_grows(memory: str, coefficient: str) -> None:
    params = make_params(7, 5, seed=4)
    batches = jax.random.normal(jax.random.key(5), (4, 8, 7))
    coefficients = {
        "constant": lambda: agent_optax.constant(0.8),
        "loss_regression": lambda: agent_optax.loss_regression(smoothing=1.0),
        "gradient_regression": agent_optax.gradient_regression,
    }
    inner = optax.chain(
        agent_optax.correct_gradients(MEMORIES[memory](), coefficients[coefficient](), scaling=0.9),
        optax.add_decayed_weights(5e-4),
        optax.sgd(0.05, momentum=0.9, nesterov=True),
    )
    sparse = functools.partial(agent_optax.sparsify, inner, agent_optax.static(), sparsity=0.6, key=3)
    refresh_at = (0, 4, 8) if memory == "snapshot" else ()
    dense, dense_state = run(sparse(storage="dense"), params, batches, refresh_at)
    compact, compact_state = run(sparse(storage="compact"), params, batches, refresh_at)
    chex.assert_trees_all_close(compact, dense, rtol=2e-5, atol=1e-6)
    if memory == "snapshot":
        chex.assert_trees_all_close(
            agent_optax.snapshot_params(compact_state, params),
            agent_optax.snapshot_params(dense_state, params),
            rtol=2e-5,
        )


def test_a_grown_weight_is_not_corrected_until_the_next_refresh() -> None:
    params = {"w": jnp.arange(1.0, 17.0).reshape(4, 4)}
    inner = optax.chain(
        agent_optax.correct_gradients(coefficient=agent_optax.constant(1.0), scaling=1.0), optax.sgd(1.0)
    )
    tx = agent_optax.sparsify(inner, agent_optax.rigl(update_every=2, stop=4), sparsity=0.5, storage="compact", key=1)
    opt_state = tx.init(params)
    params = agent_optax.mask_params(params, opt_state)
    data = jax.random.normal(jax.random.key(0), (3, 4, 4))

    def linear_loss(params, batch):
        return 0.01 * jnp.sum(params["w"] * batch)

    opt_state = agent_optax.refresh(linear_loss, params, opt_state, data)
    mean = 0.01 * data.mean(0)
    grads_fn = agent_optax.value_and_grads(linear_loss)
    start = agent_optax.active_masks(opt_state, params)["w"]

    def update(batch):
        (_, grads), extras = grads_fn(params, opt_state, batch)
        updates, state = tx.update(grads, opt_state, params, **extras)
        return optax.apply_updates(params, updates), state

    for t in range(2):
        params, opt_state = update(data[t])
    masks = agent_optax.active_masks(opt_state, params)["w"]
    grown = masks & ~start
    assert grown.any()
    after, opt_state = update(data[2])
    step = params["w"] - after["w"]
    np.testing.assert_allclose(step[grown], 0.01 * data[2][grown], rtol=1e-3)  # the plain gradient
    kept = masks & start
    np.testing.assert_allclose(step[kept], mean[kept], rtol=1e-2, atol=1e-5)  # a linear loss: g - (g - mean)
    params = after
    opt_state = agent_optax.refresh(linear_loss, params, opt_state, data)
    after, opt_state = update(data[0])
    step = params["w"] - after["w"]
    np.testing.assert_allclose(step[masks], mean[masks], rtol=1e-2, atol=1e-5)


def test_state_shrinks_with_the_density() -> None:
    params = {f"layer_{i}": jnp.ones((300, 300)) for i in range(4)}
    tx = agent_optax.sparsify(agent_optax.agent(0.1), agent_optax.rigl(), sparsity=0.99, storage="compact", key=0)

    def size(tree):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    assert size(jax.eval_shape(tx.init, params)) <= 0.10 * size(params)


def test_sparse_updates_touch_active_entries_only_and_survive_donation() -> None:
    params = make_params(7, 5, seed=1)
    tx = agent_optax.sparsify(
        optax.adam(0.1), agent_optax.set_(1), sparsity=0.7, storage="compact", updates="sparse", key=0
    )
    opt_state = tx.init(params)
    params = agent_optax.mask_params(params, opt_state)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(grads, opt_state, params)
    assert isinstance(updates["first"], agent_optax.SparseUpdate)
    assert isinstance(updates["bias"], jax.Array)
    eager = optax.apply_updates(params, updates)
    from_numpy = optax.apply_updates(jax.tree.map(np.asarray, params), updates)
    chex.assert_trees_all_equal(eager, from_numpy)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state):
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    donated, _ = step(jax.tree.map(jnp.copy, params), opt_state)
    chex.assert_trees_all_close(donated, eager, rtol=1e-6)


def test_updates_are_those_of_dense_storage() -> None:
    params = make_params(7, 5, seed=1)  # not masked: the update must clear inactive weights
    grads = jax.tree.map(jnp.ones_like, params)
    sparse = functools.partial(agent_optax.sparsify, optax.adam(0.1), agent_optax.rigl(1), sparsity=0.7, key=0)
    compact, dense = sparse(storage="compact"), sparse(storage="dense")
    masked = agent_optax.mask_params(params, dense.init(params))
    chex.assert_trees_all_close(
        compact.update(grads, compact.init(params), masked)[0], dense.update(grads, dense.init(params), masked)[0]
    )
    static = agent_optax.sparsify(optax.adam(0.1), agent_optax.static(), sparsity=0.7, key=0, storage="compact")
    opt_state = static.init(params)
    updates, _ = static.update(grads, opt_state, params)
    after = optax.apply_updates(params, updates)
    masks = agent_optax.active_masks(opt_state, params)
    assert not jnp.any(jnp.where(masks["first"], 0, after["first"]))


@pytest.mark.parametrize(
    "compute",
    [
        lambda u: 0.5 * u,
        lambda u: u / jnp.ones(()),
        lambda u: -u,
        lambda u: u + 1.0,
        lambda u: u**2,
        lambda u: u @ jnp.ones(4),
        lambda u: u.astype(jnp.bfloat16),
        lambda u: u[0],
        lambda u: float(u),
        jnp.square,
        jnp.isfinite,
        np.asarray,
        optax.tree.norm,
        jax.jit(lambda u: u),
        lambda u: optax.chain(optax.identity(), optax.clip_by_global_norm(1.0)).update(u, (None, None)),
        lambda u: optax.ema(0.9).update(u, optax.ema(0.9).init(jnp.ones((4, 4)))),
    ],
)
def test_nothing_but_adding_works_with_sparse_updates(compute) -> None:
    params = jnp.ones((4, 4))
    tx = agent_optax.sparsify(optax.sgd(0.1), agent_optax.static(), sparsity=0.5, storage="compact", updates="sparse")
    updates, _ = tx.update(params, tx.init(params), params)
    with pytest.raises((TypeError, ValueError), match=r"can only be added to its parameter.*|updates='arrays'"):
        compute(updates)
    assert optax.apply_updates(params, updates).shape == (4, 4)


def test_sparse_updates_round_once() -> None:
    params = jax.random.normal(jax.random.key(0), (8, 8), jnp.bfloat16)
    grads = jax.random.normal(jax.random.key(1), (8, 8))  # float32
    sparse = functools.partial(agent_optax.sparsify, optax.sgd(1.0), agent_optax.static(), sparsity=0.5)
    after = []
    for options in ({}, {"storage": "compact"}, {"storage": "compact", "updates": "sparse"}):
        tx = sparse(**options)
        opt_state = tx.init(params)
        masked = agent_optax.mask_params(params, opt_state)
        after.append(optax.apply_updates(masked, tx.update(grads, opt_state, masked)[0]))
    expected = np.where(
        agent_optax.active_masks(opt_state, params), (params.astype(jnp.float32) - grads).astype(jnp.bfloat16), 0
    )
    for p in after:
        np.testing.assert_array_equal(p, expected)


@pytest.mark.parametrize("name", ["muon", "adafactor", "transposing"])
def test_optimizers_that_see_shapes_are_refused(name: str) -> None:
    transposing = optax.stateless(lambda updates, params: jax.tree.map(lambda u: u[::-1] if u.ndim > 1 else u, updates))
    inner = {"muon": optax.contrib.muon(0.1), "adafactor": optax.adafactor(0.1), "transposing": transposing}[name]
    params = {"w": jnp.ones((130, 130)), "b": jnp.ones(3)}
    tx = agent_optax.sparsify(inner, agent_optax.rigl(), sparsity=0.5, storage="compact")
    with pytest.raises(ValueError, match='storage="dense"'):
        tx.init(params)
    agent_optax.sparsify(inner, agent_optax.rigl(), sparsity=0.5, storage="dense").init(params)


def test_arguments_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="'sparse'"):
        agent_optax.sparsify(optax.sgd(0.1), agent_optax.static(), sparsity=0.5, storage="sparse")
    with pytest.raises(ValueError, match="grow_by='raw'"):
        agent_optax.sparsify(
            agent_optax.agent(0.1), agent_optax.rigl(), sparsity=0.5, storage="compact", grow_by="corrected"
        )
    params = {"w": jnp.ones((4, 4))}

    def init(mask):
        tx = agent_optax.sparsify(optax.sgd(0.1), agent_optax.static(), masks={"w": mask}, storage="compact")
        return tx.init(params)

    with pytest.raises(ValueError, match="plain arrays"):
        jax.jit(init)(jnp.ones((4, 4), bool))


@pytest.mark.parametrize("storage", ["dense", "compact"])
def test_staggered_layers_change_in_turn(storage: str) -> None:
    params = {f"layer_{i}": jax.random.normal(jax.random.key(i), (6, 6)) for i in range(3)}
    tx = agent_optax.sparsify(
        optax.sgd(0.0), agent_optax.set_(update_every=6), sparsity=0.5, storage=storage, stagger=True, key=0
    )
    opt_state = tx.init(params)
    params = agent_optax.mask_params(params, opt_state)
    changes = []
    for _ in range(18):
        before = agent_optax.active_masks(opt_state, params)
        updates, opt_state = tx.update(params, opt_state, params)
        params = optax.apply_updates(params, updates)
        after = agent_optax.active_masks(opt_state, params)
        changes.append(tuple(bool(jnp.any(before[name] != after[name])) for name in params))
        assert all(int(mask.sum()) == 18 for mask in after.values())
    for layer, delay in enumerate([0, 2, 4]):
        steps = [t for t, changed in enumerate(changes, start=1) if changed[layer]]
        assert steps == list(range(6 + delay, 19, 6))
