"""A transformer in NNX through all that a run does: train, stop and go on, save, accumulate, average, spread out.

Each part is compared with Linen, with a model and a loop in bare JAX, or with sums and sorting in NumPy.
"""

import functools
import logging
import math
from pathlib import Path
from typing import Any, NamedTuple

import eight_devices
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import agent_optax
import agent_optax.flax
from agent_optax import analysis, export

WIDTH, HEADS, CONTEXT = 8, 2, 4
VOCABULARY = HIDDEN = WIDTH  # layers of equal shape share a loop: less to compile
NUM_BATCHES, BATCH_SIZE, EPOCHS, UPDATE_EVERY, SPARSITY = 4, 16, 2, 3, 0.75
PRUNED = {f"attention/{part}/kernel" for part in ("query", "key", "value", "out")} | {
    f"{name}/kernel" for name in ("up", "down", "head")
}


# ---------------------------------------------------------------------------------------------------------------------
# One transformer three times
# ---------------------------------------------------------------------------------------------------------------------


class Transformer(nnx.Module):
    """`activations`: how activations are sharded, for `nnx.Embed` under an explicit mesh."""

    def __init__(self, rngs: nnx.Rngs, activations: PartitionSpec | None = None):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.positions = nnx.Param(jax.random.normal(rngs.params(), (CONTEXT, WIDTH)))
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)
        self.activations = activations

    def __call__(self, tokens: jax.Array) -> jax.Array:
        where = {} if self.activations is None else {"out_sharding": self.activations}
        x = self.embed(tokens, **where) + self.positions[...]
        x = x + self.attention(x)
        return self.head(x + self.down(nnx.relu(self.up(self.norm(x)))))


class LinenTransformer(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        positions = self.param("positions", nn.initializers.normal(), (CONTEXT, WIDTH))
        x = nn.Embed(VOCABULARY, WIDTH, name="embed")(tokens) + positions
        x = x + nn.MultiHeadDotProductAttention(HEADS, name="attention")(x)
        y = nn.relu(nn.Dense(HIDDEN, name="up")(nn.LayerNorm(name="norm")(x)))
        return nn.Dense(VOCABULARY, name="head")(x + nn.Dense(WIDTH, name="down")(y))


def bare_transformer(params: Any, tokens: jax.Array) -> jax.Array:
    def dense(name: str, x: jax.Array) -> jax.Array:
        return x @ params[name]["kernel"] + params[name]["bias"]

    def heads(name: str, x: jax.Array) -> jax.Array:
        part = params["attention"][name]
        return jnp.einsum("blw,whd->blhd", x, part["kernel"]) + part["bias"]

    x = params["embed"]["embedding"][tokens] + params["positions"]
    query, key, value = (heads(name, x) for name in ("query", "key", "value"))
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(WIDTH // HEADS))
    out = params["attention"]["out"]
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
    x = x + jnp.einsum("bqhd,hdw->bqw", mixed, out["kernel"]) + out["bias"]
    centered = x - x.mean(-1, keepdims=True)
    y = centered / jnp.sqrt(jnp.mean(centered**2, -1, keepdims=True) + 1e-6)
    y = y * params["norm"]["scale"] + params["norm"]["bias"]
    return dense("head", x + dense("down", jax.nn.relu(dense("up", y))))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def loss_fn(model: Transformer, batch: Any) -> jax.Array:
    return cross_entropy(model(batch[0]), batch[1])


def bare_loss(params: Any, batch: Any) -> jax.Array:
    return cross_entropy(bare_transformer(params, batch[0]), batch[1])


def linen_loss(params: Any, batch: Any) -> jax.Array:
    return cross_entropy(LinenTransformer().apply({"params": params}, batch[0]), batch[1])


def all_batches() -> Any:
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (NUM_BATCHES, BATCH_SIZE, CONTEXT))
    return jnp.asarray(tokens), jnp.asarray(np.sort(tokens))


def batch_of(index: int, batches: Any) -> Any:
    return jax.tree.map(lambda x: x[index], batches)


def corrected_rigl() -> Any:
    correction = agent_optax.correct_gradients(agent_optax.snapshot(), agent_optax.gradient_regression(), scaling=1.0)
    inner = optax.chain(correction, optax.sgd(0.2, momentum=0.9))
    return agent_optax.sparsify(inner, agent_optax.rigl(UPDATE_EVERY), sparsity=SPARSITY)


# ---------------------------------------------------------------------------------------------------------------------
# How it is trained
# ---------------------------------------------------------------------------------------------------------------------

TX = corrected_rigl()  # one for all tests: the step compiles once
grads_fn = agent_optax.flax.nnx.value_and_grads(loss_fn)


@nnx.jit
def step(model: Transformer, optimizer: nnx.Optimizer, batch: Any, index: Any = None) -> jax.Array:
    (value, grads), extras = grads_fn(model, optimizer, batch)
    optimizer.update(model, grads, batch_index=index, **extras)
    return value


def started(tx: Any = TX, **options: Any) -> tuple[Transformer, nnx.Optimizer]:
    model = Transformer(nnx.Rngs(0), **options)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    agent_optax.flax.nnx.mask_model(model, optimizer)
    return model, optimizer


def params_of(model: Transformer) -> Any:
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def state_of(optimizer: nnx.Optimizer) -> Any:
    return agent_optax.flax.nnx.opt_state(optimizer)


def epoch(model: Transformer, optimizer: nnx.Optimizer, batches: Any) -> list[float]:
    agent_optax.flax.nnx.refresh(loss_fn, model, optimizer, batches)
    return [float(step(model, optimizer, batch_of(i, batches))) for i in range(NUM_BATCHES)]


class Step(NamedTuple):
    """What is seen after a step."""

    value: float
    params: Any
    masks: Any  # None where nothing is pruned
    report: dict[str, Any]


class Run(NamedTuple):
    """A run from its first line to its last."""

    model: Transformer
    optimizer: nnx.Optimizer
    steps: list[Step]


@pytest.fixture(scope="module")
def run() -> Run:
    model, optimizer = started()
    steps = []
    for _ in range(EPOCHS):
        agent_optax.flax.nnx.refresh(loss_fn, model, optimizer, all_batches())
        for i in range(NUM_BATCHES):
            value = float(step(model, optimizer, batch_of(i, all_batches())))
            params, state = params_of(model), state_of(optimizer)
            masks = agent_optax.active_masks(state, params)
            steps.append(Step(value, jax.device_get(params), jax.device_get(masks), agent_optax.diagnostics(state)))
    return Run(model, optimizer, steps)


def assert_close(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-5), actual, expected)


def assert_equal(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_same_numbers_in_bare_jax(run: Run) -> None:
    bare_grads = agent_optax.value_and_grads(bare_loss)

    @jax.jit
    def bare_step(params: Any, opt_state: Any, batch: Any) -> Any:
        (value, grads), extras = bare_grads(params, opt_state, batch)
        updates, opt_state = TX.update(grads, opt_state, params, **extras)
        return optax.apply_updates(params, updates), opt_state, value

    params = params_of(Transformer(nnx.Rngs(0)))
    opt_state, values = TX.init(params), []
    params = agent_optax.mask_params(params, opt_state)
    for _ in range(EPOCHS):
        opt_state = agent_optax.refresh(bare_loss, params, opt_state, all_batches())
        for i in range(NUM_BATCHES):
            params, opt_state, value = bare_step(params, opt_state, batch_of(i, all_batches()))
            values.append(float(value))
    np.testing.assert_allclose([s.value for s in run.steps], values, rtol=1e-5)
    assert_equal(agent_optax.active_masks(opt_state, params), run.steps[-1].masks)
    assert_close(params, run.steps[-1].params)
    assert values[-1] < values[0]


def test_same_numbers_in_linen(run: Run) -> None:
    params, linen_grads = params_of(Transformer(nnx.Rngs(0))), agent_optax.value_and_grads(linen_loss)
    state = agent_optax.flax.linen.TrainState.create(apply_fn=LinenTransformer().apply, params=params, tx=TX)
    values = []

    @jax.jit
    def linen_step(state: Any, batch: Any) -> Any:
        (value, grads), extras = linen_grads(state.params, state.opt_state, batch)
        return state.apply_gradients(grads=grads, **extras), value

    for _ in range(EPOCHS):
        state = state.replace(opt_state=agent_optax.refresh(linen_loss, state.params, state.opt_state, all_batches()))
        for i in range(NUM_BATCHES):
            state, value = linen_step(state, batch_of(i, all_batches()))
            values.append(float(value))
    np.testing.assert_allclose([s.value for s in run.steps], values, rtol=1e-5)
    assert_close(state.params, run.steps[-1].params)


# ---------------------------------------------------------------------------------------------------------------------
# What is said
# ---------------------------------------------------------------------------------------------------------------------


def test_what_is_pruned_is_said_before_training(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="agent_optax"):
        model, optimizer = started()
    (line,) = (record.getMessage() for record in caplog.records)
    taken, left = line.removesuffix("\n").split("; not pruned: ")
    assert set(taken.split(": ")[1].split(", ")) == PRUNED
    assert "positions" in left.split(", ") and "embed/embedding" in left.split(", ")
    summary = analysis.sparsity_summary(model, state_of(optimizer))
    assert {layer.name for layer in summary.layers if layer.num_ever_active is not None} == PRUNED
    masks = agent_optax.active_masks(state_of(optimizer), params_of(model))
    assert summary.pruned is not None
    assert summary.pruned.num_active == sum(int(mask.sum()) for mask in jax.tree.leaves(masks))
    assert summary.pruned.density() == pytest.approx(1 - SPARSITY, abs=0.01)


def test_what_was_forgotten_is_said(run: Run) -> None:
    """A snapshot that was never refreshed, and a model that was never masked."""
    model = Transformer(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    report = agent_optax.diagnostics(state_of(optimizer), model)
    masks = agent_optax.active_masks(state_of(optimizer), params_of(model))
    assert not report["snapshot_refreshed"]
    assert report["num_nonzero_inactive"] == sum(int(np.sum(~mask)) for mask in jax.tree.leaves(masks)) > 0
    for now in (run.steps[0].report, agent_optax.diagnostics(state_of(run.optimizer), run.model)):
        assert now["snapshot_refreshed"] and now["num_nonzero_inactive"] == 0


def test_right_after_a_rewiring_fewer_weights_are_non_zero_than_active(run: Run) -> None:
    """Grown weights start at 0 and move with the next step."""
    for number, seen in enumerate(run.steps, start=1):
        num_active = sum(int(mask.sum()) for mask in jax.tree.leaves(seen.masks))
        num_zero = sum(
            int(np.sum(leaf[mask] == 0))
            for leaf, mask in zip(jax.tree.leaves(seen.params), _leaves_with_none(seen.masks), strict=True)
            if mask is not None
        )
        assert num_active == sum(int(mask.sum()) for mask in jax.tree.leaves(run.steps[0].masks))
        assert num_zero == (int(seen.report["num_grown"]) if number % UPDATE_EVERY == 0 else 0)
    assert int(run.steps[-1].report["num_topology_updates"]) == EPOCHS * NUM_BATCHES // UPDATE_EVERY


def _leaves_with_none(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=lambda node: node is None)


# ---------------------------------------------------------------------------------------------------------------------
# Stopping and going on, files, averages
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_resumed_run_equals_an_uninterrupted_one(run: Run, tmp_path: Path) -> None:
    model, optimizer = started()
    epoch(model, optimizer, all_batches())
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(0, args=ocp.args.StandardSave(nnx.state((model, optimizer))))
        manager.wait_until_finished()
    with ocp.CheckpointManager(tmp_path) as manager:  # as another process would
        graphdef, abstract = nnx.split(nnx.eval_shape(started))
        restored = manager.restore(0, args=ocp.args.StandardRestore(abstract))
    restored = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), restored)  # bound to no device: no new compilation
    model, optimizer = nnx.merge(graphdef, restored)
    values = epoch(model, optimizer, all_batches())
    assert values == [s.value for s in run.steps[NUM_BATCHES:]]
    assert_equal(params_of(model), run.steps[-1].params)
    assert_equal(state_of(optimizer), state_of(run.optimizer))


def test_files_and_reload(run: Run, tmp_path: Path) -> None:
    path, weights = tmp_path / "model.safetensors", nnx.state(run.model, nnx.Param)
    export.save_safetensors(path, weights, state_of(run.optimizer))
    fresh = Transformer(nnx.Rngs(5))
    loaded, masks = export.load_safetensors(path, like=nnx.state(fresh, nnx.Param))
    nnx.update(fresh, loaded)
    tokens = all_batches()[0][0]
    np.testing.assert_array_equal(fresh(tokens), run.model(tokens))
    np.testing.assert_allclose(bare_transformer(run.steps[-1].params, tokens), fresh(tokens), rtol=1e-4, atol=1e-5)
    ticket = agent_optax.sparsify(optax.sgd(0.1), agent_optax.static(), masks=masks)
    again = nnx.Optimizer(fresh, ticket, wrt=nnx.Param)
    assert_equal(agent_optax.active_masks(state_of(again), params_of(fresh)), run.steps[-1].masks)


def test_an_average_is_denser_than_the_network_until_it_is_masked(run: Run) -> None:
    average = run.steps[0].params
    for seen in run.steps[1:]:
        average = optax.incremental_update(seen.params, average, 0.1)
    masked = agent_optax.mask_params(average, state_of(run.optimizer))
    for dense, sparse, mask in zip(*map(_leaves_with_none, (average, masked, run.steps[-1].masks)), strict=True):
        if mask is None:
            np.testing.assert_array_equal(sparse, dense)
            continue
        assert np.count_nonzero(dense) > mask.sum()
        np.testing.assert_array_equal(sparse, np.where(mask, dense, 0))


# ---------------------------------------------------------------------------------------------------------------------
# Accumulation and the table
# ---------------------------------------------------------------------------------------------------------------------


def test_accumulation_with_a_correction_and_rigl() -> None:
    """`chain(correct_gradients, MultiSteps(sparsify))`, against sums and sorting in NumPy."""
    weight, rate, every = 0.5, 0.5, 2
    correction = agent_optax.correct_gradients(agent_optax.snapshot(), agent_optax.constant(weight), scaling=1.0)
    sparse = agent_optax.sparsify(optax.sgd(rate), agent_optax.rigl(update_every=2), sparsity=SPARSITY)
    tx = optax.chain(correction, optax.MultiSteps(sparse, every).gradient_transformation())
    model, optimizer = started(tx)
    batches = all_batches()
    agent_optax.flax.nnx.refresh(loss_fn, model, optimizer, batches)
    snapshot = params = jax.device_get(params_of(model))
    masks = jax.device_get(agent_optax.active_masks(state_of(optimizer), params))
    gradient = jax.jit(jax.grad(bare_loss))
    old_grads = [jax.device_get(gradient(snapshot, batch_of(i, batches))) for i in range(NUM_BATCHES)]
    mean_grads = jax.tree.map(lambda *rows: np.mean(rows, axis=0), *old_grads)
    model_values = [float(step(model, optimizer, batch_of(i, batches))) for i in range(NUM_BATCHES)]

    for first in range(0, NUM_BATCHES, every):
        micro = range(first, first + every)
        grads = [jax.device_get(gradient(params, batch_of(i, batches))) for i in micro]
        olds = [old_grads[i] for i in micro]
        grads, olds = (jax.tree.map(lambda *rows: np.mean(rows, axis=0), *trees) for trees in (grads, olds))
        corrected = jax.tree.map(lambda g, old, mean: g - weight * (old - mean), grads, olds, mean_grads)
        stepped = jax.tree.map(lambda p, g: p - rate * g, params, corrected)
        due = (first // every + 1) % 2 == 0
        leaves, treedef = jax.tree.flatten(stepped)
        new_masks = []
        for i, (mask, g) in enumerate(zip(_leaves_with_none(masks), jax.tree.leaves(corrected), strict=True)):
            if mask is not None:
                leaves[i] = np.where(mask, leaves[i], 0)
                if due:
                    mask = rewired(leaves[i], mask, g)
                    leaves[i] = np.where(mask, leaves[i], 0)
            new_masks.append(mask)
        params, masks = treedef.unflatten(leaves), treedef.unflatten(new_masks)
    assert_equal(agent_optax.active_masks(state_of(optimizer), params_of(model)), masks)
    assert_close(params_of(model), params)
    assert int(agent_optax.diagnostics(state_of(optimizer))["num_topology_updates"]) == 1
    assert len(set(model_values)) == NUM_BATCHES


def rewired(weights: np.ndarray, mask: np.ndarray, grads: np.ndarray) -> np.ndarray:
    """RigL by sorting: three tenths of the smallest weights go, as many of the largest gradients come."""
    active = mask.copy().ravel()
    number = math.ceil(0.3 * active.sum())
    active[np.argsort(np.where(active, np.abs(weights).ravel(), np.inf), kind="stable")[:number]] = False
    active[np.argsort(np.where(active, np.inf, -np.abs(grads).ravel()), kind="stable")[:number]] = True
    return active.reshape(mask.shape)


def test_a_table_corrects_nothing_in_its_first_epoch() -> None:
    inner = optax.chain(agent_optax.correct_gradients(agent_optax.table(NUM_BATCHES), scaling=1.0), optax.sgd(0.2))
    model, optimizer = started(agent_optax.sparsify(inner, agent_optax.static(), sparsity=SPARSITY))
    for number in range(NUM_BATCHES + 2):
        index = number % NUM_BATCHES
        step(model, optimizer, batch_of(index, all_batches()), jnp.asarray(index))
        report = agent_optax.diagnostics(state_of(optimizer))
        assert "snapshot_refreshed" not in report
        is_first_epoch = number < NUM_BATCHES
        assert report["variance_ratio_known"] == (not is_first_epoch)
        if is_first_epoch:
            assert report["correlation"] == 0 and report["variance_ratio"] == 1
    assert report["correlation"] > 0


# ---------------------------------------------------------------------------------------------------------------------
# Eight devices
# ---------------------------------------------------------------------------------------------------------------------

if not eight_devices.ARE_HERE:

    @pytest.mark.devices
    def test_on_eight_devices(pytestconfig: pytest.Config) -> None:
        eight_devices.run_tests(__file__, "explicit_mesh", pytestconfig.rootpath)

else:

    def test_explicit_mesh(run: Run) -> None:
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
        with eight_devices.set_mesh(mesh):
            split = NamedSharding(mesh, PartitionSpec(None, "data"))
            batches = jax.tree.map(lambda x: jax.device_put(x, split), all_batches())
            model, optimizer = started(activations=PartitionSpec("data"))
            values = [value for _ in range(EPOCHS) for value in epoch(model, optimizer, batches)]
            assert len(model.up.kernel[...].sharding.device_set) == 8
        np.testing.assert_allclose(values, [s.value for s in run.steps], rtol=1e-5)
        assert_close(jax.device_get(params_of(model)), run.steps[-1].params)
        masks = agent_optax.active_masks(state_of(optimizer), params_of(model))
        assert_equal(jax.device_get(masks), run.steps[-1].masks)
