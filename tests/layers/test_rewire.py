"""Topology updates of sparse layers: the numbers of `sparsify`, in parts, and when something is wrong."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from layers_of_each_kind import connect

import agent_optax
from agent_optax import layers
from agent_optax.layers._candidates import draw_candidates
from agent_optax.layers._probe import DensePart, Probed

UPDATE_EVERY, NUM_STEPS, NUM_BATCHES = 2, 20, 4
INPUTS, HIDDEN, OUTPUTS = 12, 20, 16


def rate(count):
    """Zero at topology updates: their gradient is then that at the weights after the step, too."""
    return jnp.where((count + 1) % UPDATE_EVERY == 0, 0.0, 0.1)


OPTIMIZERS = {
    "momentum": lambda: optax.sgd(rate, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(lambda count: rate(count) / 10),
    "snapshot": lambda: agent_optax.agent(rate, momentum=0.9),
    "cached": lambda: optax.chain(
        agent_optax.correct_gradients(agent_optax.snapshot(NUM_BATCHES), agent_optax.constant(0.8)), optax.sgd(rate)
    ),
    "table": lambda: optax.chain(
        agent_optax.correct_gradients(agent_optax.table(NUM_BATCHES), agent_optax.gradient_regression(), 0.9),
        optax.sgd(rate, momentum=0.9),
    ),
    "history": lambda: optax.chain(
        agent_optax.correct_gradients(agent_optax.history(), agent_optax.gradient_regression(), 0.9), optax.sgd(rate)
    ),
}
TOPOLOGIES = {
    "rigl": agent_optax.rigl(UPDATE_EVERY, 0.4),
    "set_": agent_optax.set_(UPDATE_EVERY, 0.4),
}


def batches(dtype=jnp.float32):
    x = jax.random.normal(jax.random.key(0), (NUM_BATCHES, 8, INPUTS), dtype)
    return x, jnp.sin(3 * x[..., :1] * x[..., 1:2])


def start(kind, dtype=jnp.float32):
    connections = {"first": connect(kind, INPUTS, HIDDEN, 0.4), "second": connect(kind, HIDDEN, OUTPUTS, 0.4, seed=1)}
    params = {
        name: layers.init_values(jax.random.key(i), c, dtype=dtype) for i, (name, c) in enumerate(connections.items())
    }
    return connections, params


def loss_of(dot):
    def loss_fn(params, batch, connections=None):
        x, y = batch
        for name in ("first", "second"):
            x = jnp.tanh(dot(x, params[name], connections and connections[name]))
        return jnp.mean((x.mean(-1, keepdims=True) - y) ** 2)

    return loss_fn


sparse_loss, dense_loss = loss_of(layers.sparse_dot), loss_of(lambda x, kernel, _: x @ kernel)


@jax.jit
def dense(params, connections):
    return {name: layers.to_dense(values, connections[name]) for name, values in params.items()}


def train_dense(tx, params, data, refresh_every):
    """The weights after each topology update, and the keys of those."""
    opt_state = tx.init(params)
    params = agent_optax.mask_params(params, opt_state)

    @jax.jit
    def step(params, opt_state, index):
        batch = jax.tree.map(lambda a: a[index], data)
        (_, grads), extras = agent_optax.value_and_grads(dense_loss)(params, opt_state, batch)
        updates, opt_state = tx.update(grads, opt_state, params, batch_index=index, **extras)
        return optax.apply_updates(params, updates), opt_state

    kernels, keys = [], []
    for t in range(NUM_STEPS):
        if refresh_every and t % refresh_every == 0:
            opt_state = agent_optax.refresh(dense_loss, params, opt_state, data)
        keys.append(jax.random.split(jax.random.wrap_key_data(optax.tree.get(opt_state, "topology_key")))[1])
        params, opt_state = step(params, opt_state, t % NUM_BATCHES)
        kernels.append(params)
    return kernels, keys


def train_sparse(tx, topology, connections, params, data, keys, refresh_every):
    opt_state = tx.init(params)

    @jax.jit
    def step(params, connections, opt_state, index):
        batch = jax.tree.map(lambda a: a[index], data)
        (_, grads), extras = agent_optax.value_and_grads(sparse_loss)(params, opt_state, batch, connections)
        updates, opt_state = tx.update(grads, opt_state, params, batch_index=index, **extras)
        return optax.apply_updates(params, updates), opt_state

    kernels, num_grown = [], 0
    for t in range(NUM_STEPS):
        if refresh_every and t % refresh_every == 0:
            opt_state = agent_optax.refresh(sparse_loss, params, opt_state, data, args=(connections,))
        params, opt_state = step(params, connections, opt_state, t % NUM_BATCHES)
        if topology.is_due(t + 1):
            batch = jax.tree.map(lambda a: a[t % NUM_BATCHES], data)  # noqa: B023
            params, connections, opt_state, grown, is_finite = layers.rewire(
                sparse_loss, params, connections, opt_state, batch, tx=tx, topology=topology, step=t + 1, key=keys[t]
            )
            assert is_finite
            num_grown += int(grown)
        kernels.append(dense(params, connections))
    assert num_grown > 100
    return kernels


@pytest.mark.parametrize(
    ("kind", "optimizer", "topology"),
    [
        ("fan_in:3", "adam", "rigl"),  # the last group has two outputs, or one
        ("fan_in:3", "snapshot", "rigl"),
        ("fan_in:3", "table", "rigl"),
        ("fan_in:1", "momentum", "rigl"),
        ("fan_in:1", "history", "set_"),
        ("fan_in:16", "cached", "set_"),
        ("any_mask", "snapshot", "rigl"),
    ],
)
def test_ten_rewirings_are_those_of_sparsify(kind, optimizer, topology, x64):
    connections, params = start(kind, jnp.float64)
    pattern = None if kind == "any_mask" else agent_optax.fan_in(group=int(kind.split(":")[1]))
    masks = {name: c.mask() for name, c in connections.items()}
    refresh_every = 7 if optimizer in ("snapshot", "cached") else None
    sparsify = agent_optax.sparsify(
        OPTIMIZERS[optimizer](), TOPOLOGIES[topology], masks=masks, pattern=pattern, storage="compact"
    )
    data = batches(jnp.float64)
    expected, keys = train_dense(sparsify, dense(params, connections), data, refresh_every)
    found = train_sparse(OPTIMIZERS[optimizer](), TOPOLOGIES[topology], connections, params, data, keys, refresh_every)
    for t, (kernels, exact) in enumerate(zip(found, expected, strict=True)):
        for name in kernels:
            np.testing.assert_array_equal(kernels[name] != 0, exact[name] != 0, err_msg=f"step {t}")
            np.testing.assert_allclose(kernels[name], exact[name], rtol=1e-6, atol=1e-9, err_msg=f"step {t}")


def numpy_rigl(kernel, mask, grads, fraction, may_grow=True):
    """RigL with constant fan-in, output by output."""
    k = mask[:, 0].sum()
    num_dropped = math.ceil(fraction * mask.sum())
    order = np.argsort(np.where(mask, np.abs(kernel), np.inf), axis=None)
    kept = mask.copy()
    kept.flat[order[:num_dropped]] = False
    new, allowed = kept.copy(), np.broadcast_to(may_grow, mask.shape)
    for o in range(mask.shape[1]):
        candidates = np.argsort(-np.where(kept[:, o] | ~allowed[:, o], -1, np.abs(grads[:, o])))
        new[candidates[: k - kept[:, o].sum()], o] = True
    return new


@pytest.mark.parametrize("num_outputs", [20, 7])
def test_parts_are_rewired_each_as_a_layer_of_its_own(num_outputs):
    connections, params = start("fan_in:1")
    batch = jax.tree.map(lambda a: a[0], batches())
    kernels = dense(params, connections)
    grads = jax.grad(dense_loss)(kernels, batch)
    rewired = layers.rewire(
        sparse_loss, params, connections, (), batch, tx=optax.sgd(0.1), topology=agent_optax.rigl(1, 0.4), step=1,
        key=jax.random.key(0), max_bytes=HIDDEN * num_outputs * 4,
    )  # fmt: skip
    sizes = {"first": HIDDEN * num_outputs // INPUTS, "second": num_outputs}  # outputs for which there is room
    for name, connection in connections.items():
        mask = np.asarray(connection.mask())
        outputs = mask.shape[1]
        num_parts = -(-outputs // min(sizes[name], outputs))
        size = -(-outputs // num_parts)
        parts = [slice(i, min(i + size, outputs)) for i in range(0, outputs, size)]
        kernel, grad = np.asarray(kernels[name]), np.asarray(grads[name])
        expected = np.concatenate([numpy_rigl(kernel[:, p], mask[:, p], grad[:, p], 0.4) for p in parts], axis=1)
        new_mask = np.asarray(rewired.connections[name].mask())
        np.testing.assert_array_equal(new_mask, expected)
        new_kernel = layers.to_dense(rewired.params[name], rewired.connections[name])
        np.testing.assert_array_equal(new_kernel, np.where(new_mask & mask, kernel, 0))
    assert sum(int((c.mask() & ~connections[name].mask()).sum()) for name, c in rewired.connections.items()) == (
        rewired.num_grown
    )


@pytest.mark.parametrize("kind", ["fan_in:3", "fan_in:16", "any_mask"])
@pytest.mark.parametrize("free", [True, False])
def test_candidates_are_drawn_evenly_among_weights_that_do_not_exist(kind, free):
    connections = connect(kind, INPUTS, HIDDEN, 0.4)
    number = connections.num_places - connections.places.shape[1]
    number = number if free else number // 3
    drawn = jax.vmap(lambda key: draw_candidates(key, connections, number).places)(
        jax.random.split(jax.random.key(0), 400)
    )
    places, num_places = np.asarray(connections.places), connections.num_places
    expected = number / (num_places - places.shape[1])
    for row, own in enumerate(places):
        assert all(len(np.unique(draw)) == number for draw in drawn[:, row])
        share = np.bincount(np.ravel(drawn[:, row]), minlength=num_places) / len(drawn)
        np.testing.assert_array_equal(share[own], 0)
        others = np.delete(share, own)
        np.testing.assert_allclose(others, expected, atol=0 if free else 0.25)  # strata differ by one place
        assert others.mean() == pytest.approx(expected)


@pytest.mark.parametrize(("kind", "topology"), [("fan_in:3", "taylor"), ("fan_in:16", "rigl"), ("any_mask", "rigl")])
def test_with_all_candidates_growth_is_that_by_the_dense_gradient(kind, topology):
    topology = {"taylor": agent_optax.drop_and_grow(agent_optax.taylor, drop_fraction=0.4), **TOPOLOGIES}[topology]
    connections, params = start(kind)
    batch, tx = jax.tree.map(lambda a: a[0], batches()), optax.sgd(0.1)
    options = {"tx": tx, "topology": topology, "step": 2, "key": jax.random.key(0)}
    exact, found = (
        layers.rewire(sparse_loss, params, connections, tx.init(params), batch, candidates=candidates, **options)
        for candidates in (None, 100.0)
    )
    assert found.num_grown == exact.num_grown > 10
    for name in params:
        np.testing.assert_array_equal(found.connections[name].mask(), exact.connections[name].mask())
        np.testing.assert_array_equal(found.params[name], exact.params[name])


def test_growth_is_by_gradient_among_the_candidates():
    connections, params = start("fan_in:1")
    batch = jax.tree.map(lambda a: a[0], batches())
    kernels = dense(params, connections)
    grads = jax.grad(dense_loss)(kernels, batch)
    key = jax.random.key(3)
    rewired = layers.rewire(
        sparse_loss, params, connections, (), batch, tx=optax.sgd(0.1), topology=agent_optax.rigl(1, 0.4), step=1,
        key=key, candidates=0.5,
    )  # fmt: skip
    for name, own_key in zip(connections, jax.random.split(key, 2), strict=True):
        number = math.ceil(0.5 * connections[name].fan_in)
        drawn = draw_candidates(jax.random.split(own_key)[0], connections[name], number)
        mask, candidates = np.asarray(connections[name].mask()), np.asarray(drawn.mask())
        assert not (mask & candidates).any() and (candidates.sum(axis=0) == number).all()
        expected = numpy_rigl(np.asarray(kernels[name]), mask, np.asarray(grads[name]), 0.4, may_grow=mask | candidates)
        np.testing.assert_array_equal(rewired.connections[name].mask(), expected)


@pytest.mark.parametrize("kind", ["fan_in:3", "any_mask"])
def test_candidates_of_a_convolution(kind):
    connections = {"conv": connect(kind, 3 * 3 * 2, 10)}
    params = {"conv": layers.init_values(jax.random.key(0), connections["conv"])}
    x, tx = jax.random.normal(jax.random.key(1), (2, 5, 5, 2)), optax.adam(0.1)

    def loss_fn(params, x, connections):
        return jnp.sum(jnp.sin(layers.sparse_conv(x, params["conv"], connections["conv"], kernel_size=3)))

    options = {"tx": tx, "topology": TOPOLOGIES["rigl"], "step": 2, "key": jax.random.key(0)}
    exact, found = (
        layers.rewire(loss_fn, params, connections, tx.init(params), x, candidates=candidates, **options)
        for candidates in (None, 100.0)
    )
    np.testing.assert_array_equal(found.connections["conv"].mask(), exact.connections["conv"].mask())


@pytest.mark.parametrize("kind", ["fan_in:3", "any_mask"])
def test_a_probe_gives_the_dense_gradient_of_a_convolution(kind):
    connections = connect(kind, 3 * 3 * 2, 10)
    values = jax.random.normal(jax.random.key(0), connections.values_shape)
    x = jax.random.normal(jax.random.key(1), (2, 5, 5, 2))
    options = {"strides": (2, 1), "padding": "SAME"}

    def sparse(kernel):
        probed = Probed(connections, DensePart(kernel, jnp.asarray(4)))
        return jnp.sum(jnp.sin(layers.sparse_conv(x, values, probed, kernel_size=3, **options)))

    def with_dense_kernel(kernel):
        y = jax.lax.conv_general_dilated(
            x, kernel.reshape(3, 3, 2, 10), options["strides"], "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.sum(jnp.sin(y))

    exact = jax.grad(with_dense_kernel)(layers.to_dense(values, connections))
    np.testing.assert_allclose(jax.grad(sparse)(jnp.zeros((18, 3))), exact[:, 4:7], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("optimizer", "bad"), [("adam", "weight"), ("snapshot", "batch")])
def test_what_is_not_finite_changes_nothing(optimizer, bad):
    connections, params = start("fan_in:3")
    tx = OPTIMIZERS[optimizer]()
    opt_state = tx.init(params)
    batch = jax.tree.map(lambda a: a[0], batches())
    if bad == "batch":
        batch = (batch[0].at[0, 0].set(jnp.nan), batch[1])
    else:
        params["second"] = params["second"].at[0, 0].set(jnp.inf)
    rewired = layers.rewire(
        sparse_loss, params, connections, opt_state, batch, tx=tx, topology=TOPOLOGIES["rigl"], step=2,
        key=jax.random.key(0),
    )  # fmt: skip
    assert not rewired.is_finite and rewired.num_grown == 0
    now = {name: c.without_point() for name, c in rewired.connections.items()}
    jax.tree.map(
        np.testing.assert_array_equal, (rewired.params, now, rewired.opt_state), (params, connections, opt_state)
    )


@pytest.mark.parametrize("optimizer", ["adam", "snapshot"])
def test_prepared_connections_keep_their_structure_and_types(optimizer):
    """So nothing that takes them compiles again, and a checkpoint from before is like one from after."""
    connections, params = start("fan_in:3")
    tx = OPTIMIZERS[optimizer]()
    opt_state = tx.init(params)
    batch = jax.tree.map(lambda a: a[0], batches())
    connections = layers.prepare_rewiring(params, connections, opt_state)
    rewired = layers.rewire(
        sparse_loss, params, connections, opt_state, batch, tx=tx, topology=TOPOLOGIES["rigl"], step=2,
        key=jax.random.key(0),
    )  # fmt: skip
    before, after = (params, connections, opt_state), (rewired.params, rewired.connections, rewired.opt_state)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert [str(jax.typeof(a)) for a in jax.tree.leaves(before)] == [str(jax.typeof(a)) for a in jax.tree.leaves(after)]
    assert [a.weak_type for a in jax.tree.leaves(before)] == [a.weak_type for a in jax.tree.leaves(after)]


def test_recursion_begins_anew():
    connections, params = start("fan_in:3")
    tx = agent_optax.storm(0.1)
    data = batches()
    opt_state = tx.init(params)

    @jax.jit
    def step(params, connections, opt_state, batch):
        (_, grads), extras = agent_optax.value_and_grads(sparse_loss)(params, opt_state, batch, connections)
        updates, opt_state = tx.update(grads, opt_state, params, **extras)
        return updates, optax.apply_updates(params, updates), opt_state

    for t in range(3):
        batch = jax.tree.map(lambda a: a[t], data)  # noqa: B023
        _, params, opt_state = step(params, connections, opt_state, batch)
    params, connections, opt_state, *_ = layers.rewire(
        sparse_loss, params, connections, opt_state, batch, tx=tx, topology=TOPOLOGIES["rigl"], step=3,
        key=jax.random.key(0),
    )  # fmt: skip
    updates, *_ = step(params, connections, opt_state, batch)
    fresh, *_ = step(params, connections, tx.init(params), batch)
    jax.tree.map(np.testing.assert_array_equal, updates, fresh)


def test_errors_name_what_is_wrong():
    connections, params = start("fan_in:3")
    batch, tx = jax.tree.map(lambda a: a[0], batches()), optax.sgd(0.1)

    def call(params=params, connections=connections, topology=TOPOLOGIES["rigl"], opt_state=None, **options):
        opt_state = tx.init(params) if opt_state is None else opt_state
        return layers.rewire(
            sparse_loss, params, connections, opt_state, batch, tx=tx, topology=topology, step=1,
            key=jax.random.key(0), **options,
        )  # fmt: skip

    with pytest.raises(TypeError, match="topology must be one such as"):
        call(topology="rigl")
    with_memory = agent_optax.drop_and_grow(grow=agent_optax.momentum_magnitude, momentum=0.9)
    for topology in (agent_optax.static(), agent_optax.snfs(), agent_optax.gradual_pruning(1000), with_memory):
        with pytest.raises(ValueError, match="replaces weights within a layer"):
            call(topology=topology)
    with pytest.raises(ValueError, match="'third' or 'third/values', and the parameters are"):
        call(connections={"third": connections["first"]})
    with pytest.raises(ValueError, match=r"'first' has the shape \[20, 5\].*weights of shape \[16, 8\]"):
        call(connections={"first": connections["second"]})
    with pytest.raises(ValueError, match="two of the connections go with the parameter 'first'"):
        call(connections={"first": connections["first"], "first/connections": connections["first"]})
    with pytest.raises(ValueError, match="connections holds none"):
        call(connections={})
    with pytest.raises(ValueError, match="max_bytes must be"):
        call(max_bytes=0)
    for candidates in (0, -1.0, math.nan, math.inf, "all"):
        with pytest.raises(ValueError, match=f"candidates must be a positive number such as 1.0, got {candidates!r}"):
            call(candidates=candidates)


def test_connections_of_a_point_belong_to_their_parameters():
    connections, params = start("fan_in:3")
    tx, data = agent_optax.agent(0.1), batches()
    batch = jax.tree.map(lambda a: a[0], data)
    opt_state = agent_optax.refresh(sparse_loss, params, tx.init(params), data, args=(connections,))
    params, connections, opt_state, *_ = layers.rewire(
        sparse_loss, params, connections, opt_state, batch, tx=tx, topology=TOPOLOGIES["rigl"], step=2,
        key=jax.random.key(0),
    )  # fmt: skip
    with pytest.raises(ValueError, match="was rewired whose weights were the parameter 'first'"):
        agent_optax.value_and_grads(lambda p, batch, c: sparse_loss(p["net"], batch, c))(
            {"net": params}, agent_optax.agent(0.1).init({"net": params}), batch, connections
        )
