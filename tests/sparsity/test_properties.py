"""What holds for a sparse optimizer at every step, whatever it wraps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import agent_optax

INNER = {
    "momentum": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(0.01),
    "rmsprop": lambda: optax.rmsprop(0.01, initial_scale=0.5),
    "muon": lambda: optax.contrib.muon(0.01),
}
TOPOLOGIES = {"static": agent_optax.static, "set": agent_optax.set_, "rigl": agent_optax.rigl}


def make_params(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "first": {"kernel": jax.random.normal(keys[0], (8, 6), dtype), "bias": jnp.ones(6, dtype)},
        "second": {"kernel": jax.random.normal(keys[1], (6, 5), dtype)},
    }


def make_topology(name: str):
    return TOPOLOGIES[name]() if name == "static" else TOPOLOGIES[name](update_every=2)


def random_grads(params, t):
    return jax.tree.map(lambda p: jax.random.normal(jax.random.key(100 + t), p.shape, p.dtype), params)


def kernels_of(tree):
    return {name: layer["kernel"] for name, layer in tree.items()}


@pytest.mark.parametrize("storage", ["dense", "compact"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_inactive_weights_are_exactly_zero_and_counts_constant(topology, dtype, storage):
    params = make_params(dtype)
    tx = agent_optax.sparsify(
        optax.sgd(0.1, momentum=0.9),
        make_topology(topology),
        sparsity=0.7,
        distribution=agent_optax.uniform,
        storage=storage,
    )
    opt_state = tx.init(params)
    params = agent_optax.mask_params(params, opt_state)
    for t in range(7):
        updates, opt_state = tx.update(random_grads(params, t), opt_state, params)
        params = optax.apply_updates(params, updates)
        masks = agent_optax.active_masks(opt_state, params)
        assert masks["first"]["bias"] is None
        for name, kernel in kernels_of(params).items():
            mask = masks[name]["kernel"]
            assert int(mask.sum()) == round(0.3 * kernel.size)
            assert kernel.dtype == dtype
            assert not np.any(np.asarray(kernel.astype(jnp.float32))[~np.asarray(mask)])
    assert np.all(np.asarray(params["first"]["bias"]) != 0)


def per_weight_states(tx, inner_state, params):
    """The arrays of a state that have one entry for each weight of a kernel, by name."""
    return [
        leaf
        for leaf in jax.tree.leaves(inner_state)
        if leaf.shape in {kernel.shape for kernel in kernels_of(params).values()}
    ]


@pytest.mark.parametrize("topology", ["set", "rigl"])
@pytest.mark.parametrize("name", INNER)
def test_grown_weights_start_with_a_fresh_inner_state(name, topology):
    params = make_params()
    tx = agent_optax.sparsify(INNER[name](), make_topology(topology), sparsity=0.6)
    opt_state = tx.init(params)
    params = agent_optax.mask_params(params, opt_state)
    fresh = per_weight_states(tx, opt_state.inner_state, params)
    assert fresh
    update, num_grown = jax.jit(tx.update), 0
    for t in range(4):
        before = agent_optax.active_masks(opt_state, params)
        updates, opt_state = update(random_grads(params, t), opt_state, params)
        params = optax.apply_updates(params, updates)
        after = agent_optax.active_masks(opt_state, params)
        shapes = {p["kernel"].shape: (before[k]["kernel"], after[k]["kernel"]) for k, p in params.items()}
        for start, state in zip(fresh, per_weight_states(tx, opt_state.inner_state, params), strict=True):
            old, new = shapes[state.shape]
            grown = np.asarray(new & ~old)
            num_grown += grown.sum()
            np.testing.assert_array_equal(np.asarray(state)[grown], np.asarray(start)[grown])
    assert num_grown > 0


def test_survivors_keep_their_state_and_other_leaves_do_not_notice():
    params = make_params()
    inner = optax.adam(0.01)
    tx = agent_optax.sparsify(inner, agent_optax.set_(update_every=2), sparsity=0.5)
    plain = agent_optax.sparsify(inner, agent_optax.static(), sparsity=0.5)
    state, plain_state, bias_state = tx.init(params), plain.init(params), inner.init(params)
    params = agent_optax.mask_params(params, state)
    start = agent_optax.active_masks(state, params)
    for t in range(2):
        grads = random_grads(params, t)
        updates, state = tx.update(grads, state, params)
        _, plain_state = plain.update(grads, plain_state, params)
        bias_updates, bias_state = inner.update(grads, bias_state, params)
        np.testing.assert_allclose(updates["first"]["bias"], bias_updates["first"]["bias"], rtol=1e-5)
        params = optax.apply_updates(params, updates)
    kept = start["first"]["kernel"] & agent_optax.active_masks(state, params)["first"]["kernel"]
    assert 0 < kept.sum() < start["first"]["kernel"].sum()
    mu, plain_mu = (s.inner_state[0].mu["first"]["kernel"] for s in (state, plain_state))
    np.testing.assert_allclose(mu[kept], plain_mu[kept], rtol=1e-6)


@pytest.mark.parametrize("storage", ["dense", "compact"])
def test_ten_thousand_steps_in_a_scan_compile_once(storage):
    params = make_params()
    tx = agent_optax.sparsify(
        optax.sgd(0.01, momentum=0.9), agent_optax.rigl(update_every=100), sparsity=0.7, storage=storage
    )
    num_traces = 0

    @jax.jit
    def train(params, opt_state):
        def step(carry, t):
            nonlocal num_traces
            num_traces += 1
            params, opt_state = carry
            updates, opt_state = tx.update(random_grads(params, t), opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        return jax.lax.scan(step, (params, opt_state), jnp.arange(10_000))[0]

    opt_state = tx.init(params)
    params, opt_state = train(agent_optax.mask_params(params, opt_state), opt_state)
    first_traces = num_traces
    params, opt_state = train(params, opt_state)
    assert num_traces == first_traces
    assert train._cache_size() == 1
    assert int(agent_optax.diagnostics(opt_state)["num_topology_updates"]) == 200


def test_updates_come_when_due_with_the_fraction_of_that_step():
    params = {"w": jnp.arange(1.0, 101.0).reshape(10, 10)}
    topology = agent_optax.set_(update_every=3, drop_fraction=lambda step: step / 20, start=4, stop=11)
    tx = agent_optax.sparsify(optax.sgd(0.0), topology, sparsity=0.5, distribution=agent_optax.uniform)
    state = tx.init(params)
    params = agent_optax.mask_params(params, state)
    ever, due = agent_optax.active_masks(state, params)["w"], []
    for t in range(1, 15):
        before = agent_optax.active_masks(state, params)["w"]
        updates, state = tx.update(params, state, params)
        params = optax.apply_updates(params, updates)
        after = agent_optax.active_masks(state, params)["w"]
        ever |= after
        if bool(jnp.any(before != after)):
            due.append(t)
            assert int((before & ~after).sum()) <= round(50 * t / 20)
        assert float(agent_optax.diagnostics(state)["exploration_rate"]) == pytest.approx(float(ever.mean()))
    assert due == [4, 7, 10]


@pytest.mark.parametrize("storage", ["dense", "compact"])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_gradient_that_is_not_finite_leaves_the_topology(bad, storage):
    params = make_params()
    tx = agent_optax.sparsify(optax.sgd(0.0), agent_optax.rigl(update_every=1), sparsity=0.5, storage=storage)
    state = tx.init(params)
    params = agent_optax.mask_params(params, state)
    for path in ("kernel", "bias"):
        grads = random_grads(params, 0)
        grads["first"][path] = grads["first"][path].at[(0,) * grads["first"][path].ndim].set(bad)
        before = agent_optax.active_masks(state, params)
        _, state = tx.update(grads, state, params)
        after = agent_optax.active_masks(state, params)
        assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), before, after)))
    report = agent_optax.diagnostics(state)
    assert (int(report["num_skipped_updates"]), int(report["num_topology_updates"])) == (2, 0)


def test_where_sparsity_masks_and_key_are_respected():
    params = make_params()
    sparse = functools.partial(agent_optax.sparsify, optax.sgd(0.1), agent_optax.static())

    def density(tx, name):
        return float(agent_optax.active_masks(tx.init(params), params)[name]["kernel"].mean())

    only_first = {"first": {"kernel": True, "bias": False}, "second": False}
    masks = agent_optax.active_masks(sparse(sparsity=0.5, where=only_first).init(params), params)
    assert masks["second"]["kernel"] is None
    by_path = sparse(sparsity=lambda path: 0.75 if path == "first/kernel" else 0.5)
    assert (density(by_path, "first"), density(by_path, "second")) == (0.25, 0.5)
    by_tree = sparse(sparsity={"first": {"kernel": 0.75, "bias": None}, "second": {"kernel": None}})
    assert (density(by_tree, "first"), density(by_tree, "second")) == (0.25, 1.0)
    given = {"first": {"kernel": jnp.eye(8, 6, dtype=bool), "bias": None}, "second": {"kernel": None}}
    ticket = agent_optax.active_masks(sparse(masks=given).init(params), params)
    np.testing.assert_array_equal(ticket["first"]["kernel"], given["first"]["kernel"])
    masks = [agent_optax.active_masks(sparse(sparsity=0.5, key=key).init(params), params) for key in (1, 1, 2)]
    first, again, other = (m["first"]["kernel"] for m in masks)
    assert bool(jnp.all(first == again)) and bool(jnp.any(first != other))


def test_growth_by_the_corrected_gradient():
    params = {"w": jnp.ones((4, 4))}
    inner = optax.chain(
        agent_optax.correct_gradients(coefficient=agent_optax.constant(1.0), scaling=1.0), optax.sgd(0.0)
    )
    loss = lambda params, batch: jnp.sum(params["w"] * batch)  # noqa: E731
    mask = jnp.zeros((4, 4), bool).at[:2].set(True)
    batches = jnp.stack([jnp.zeros((4, 4)).at[2, 0].set(2.0), jnp.zeros((4, 4)).at[3, 0].set(5.0)])
    grown = {}
    for grow_by in ("raw", "corrected"):
        tx = agent_optax.sparsify(
            inner, agent_optax.rigl(update_every=1, drop_fraction=0.1), masks={"w": mask}, grow_by=grow_by
        )
        state = tx.init(params)
        masked = agent_optax.mask_params(params, state)
        state = agent_optax.refresh(loss, masked, state, batches)
        (_, grads), extras = agent_optax.value_and_grads(loss)(masked, state, batches[0])
        _, state = tx.update(grads, state, masked, **extras)
        grown[grow_by] = np.argwhere(agent_optax.active_masks(state, params)["w"] & ~mask).tolist()
    assert grown == {"raw": [[2, 0]], "corrected": [[3, 0]]}
