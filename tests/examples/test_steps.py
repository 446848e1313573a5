"""A step of every objective, memory and topology; and what no second evaluation may touch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import train
from loaders import DataSet, LabelledImages
from training.augmentation import augment
from training.config import (
    Config,
    CorrectionConfig,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TopologyConfig,
)
from training.evaluation import evaluate
from training.interruption import Interruption
from training.objective import build_objective

import agent_optax

pytestmark = pytest.mark.examples

TINY = Config(
    data=DataConfig(shift=1, flip=True),
    model=ModelConfig(hidden=(12,)),
    topology=TopologyConfig(name="set", sparsity=0.5, update_every=2),
    correction=CorrectionConfig(),
    objective=ObjectiveConfig(num_steps=2, epsilon=0.1, step_size=0.05),
    epochs=2,
    batch_size=8,
)
FIXED = {"data": DataConfig(shift=0, flip=False)}


@pytest.fixture(scope="module")
def data() -> DataSet:
    rng = np.random.default_rng(0)
    splits = [
        LabelledImages(rng.integers(0, 256, (n, 6, 6, 1), np.uint8), rng.integers(0, 3, n).astype(np.int32))
        for n in (34, 11)
    ]
    return DataSet(*splits, num_classes=3)


def with_parts(**parts) -> Config:
    return dataclasses.replace(TINY, **parts)


def same(left, right) -> bool:
    """Equal to the last bit, nan to nan."""
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.asarray(_data(a)).tobytes() == np.asarray(_data(b)).tobytes() for a, b in pairs)


def _data(leaf):
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


def copy(tree):
    return jax.tree.map(jnp.copy, tree)  # the functions of training take over the state that they are given


def epochs(config: Config, data: DataSet, count: int = 1):
    """The state after so many epochs, in the middle of whose end it is not yet set back."""
    _, steps, state = train.build(config, data)
    for epoch in range(count):
        if epoch:
            state = state.begin_epoch()
        state = train.train_epoch(config, steps, state, data, Interruption())
    return steps, state


@pytest.mark.parametrize("name", ["at", "trades", "mart"])
def test_every_objective_takes_an_epoch(data, name):
    config = with_parts(objective=dataclasses.replace(TINY.objective, name=name))
    _, _, start = train.build(config, data)
    steps, state = epochs(config, data)
    assert int(state.epoch_step) == steps.per_epoch == 4  # of 34 images, two are left out
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state.params, state.variables)))
    assert not same(start.params, state.params) and not same(start.variables, state.variables)
    assert 0 <= float(state.sums["num_right"]) <= 32 and float(state.sums["loss"]) > 0
    report = agent_optax.diagnostics(state.opt_state)
    assert float(report["sparsity"]) == pytest.approx(0.5, abs=0.01) and int(report["num_topology_updates"]) == 2


def test_losses_of_the_objectives_differ_as_they_should(data):
    """On the same batch: an attack raises the cross-entropy; with beta 0 TRADES is the clean cross-entropy."""
    network, _, state = train.build(TINY, data)
    images, labels = data.train.images[:8] / np.float32(255), data.train.labels[:8]
    losses = {}
    for name, beta in (("natural", 6.0), ("at", 6.0), ("trades", 6.0), ("trades", 0.0)):
        objective = build_objective(dataclasses.replace(TINY.objective, name=name, beta=beta), network)
        batch = objective.prepare(state.params, state.variables, images, labels, jax.random.key(1))
        losses[name, beta] = float(objective.loss(state.params, state.variables, batch)[0])
        if name != "natural":
            assert 0.05 < np.abs(batch["attacked"] - images).max() <= 0.1 + 1e-6
    assert losses["at", 6.0] > losses["natural", 6.0]
    assert losses["trades", 6.0] > losses["trades", 0.0] == pytest.approx(losses["natural", 6.0], rel=1e-6)


@pytest.mark.parametrize(
    ("memory", "coefficient", "topology", "storage"),
    [
        ("snapshot", "scheduled", "static", "dense"),
        ("cached_snapshot", "gradient_regression", "rigl", "compact"),
        ("recursion", "constant", "static", "dense"),
        ("table", "gradient_regression", "static", "dense"),
        ("history", "loss_regression", "static", "compact"),
    ],
)
def test_every_memory_takes_two_epochs(data, memory, coefficient, topology, storage):
    config = with_parts(
        **FIXED,
        topology=TopologyConfig(topology, 0.5, update_every=3 if topology == "rigl" else None, storage=storage),
        correction=CorrectionConfig(memory=memory, coefficient=coefficient, scaling=0.5),
    )
    _, state = epochs(config, data, 2)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    kernel = state.params["linears"][0]["kernel"]
    masks = agent_optax.active_masks(state.opt_state, state.params)
    assert not np.any(np.where(masks["linears"][0]["kernel"], 0, kernel))
    weight = float(state.sums["correction_weight"])
    assert 0 <= weight <= 0.5 * 4
    assert weight > 0 or coefficient != "constant"


@pytest.mark.parametrize("name", ["dense", "static", "set_itop"])
def test_every_topology_takes_an_epoch(data, name):
    changes = name not in ("dense", "static")
    config = with_parts(
        topology=TopologyConfig(name=name, sparsity=0.5, update_every=2 if changes else None),
        correction=CorrectionConfig(memory="none"),
    )
    _, state = epochs(config, data)
    if name != "dense":
        report = agent_optax.diagnostics(state.opt_state)
        assert int(report["num_topology_updates"]) == (2 if changes else 0)
        assert (float(report["exploration_rate"]) > 0.51) == changes
    else:
        assert all((np.asarray(layer["kernel"]) != 0).all() for layer in state.params["linears"].values())


@pytest.mark.parametrize("name", ["snfs", "bayesian_rewiring", "gradual_pruning"])
def test_topologies_that_change_the_size_of_layers(data, name):
    config = with_parts(
        topology=TopologyConfig(name=name, sparsity=0.5, update_every=None if name == "bayesian_rewiring" else 2),
        correction=CorrectionConfig(memory="none"),
        optimizer=OptimizerConfig(decoupled=True),
    )
    _, state = epochs(config, data, 2)
    report = agent_optax.diagnostics(state.opt_state)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    assert 0.4 < float(report["sparsity"]) < 0.55  # a surplus of BSR-Net is never cut
    if name == "gradual_pruning":
        assert float(report["sparsity"]) == pytest.approx(0.5, abs=0.01) and float(report["exploration_rate"]) == 1


@pytest.mark.parametrize("objective", ["natural", "trades"])
def test_variables_see_the_current_weights_only(data, objective):
    """They are those of a network that evaluates nothing else: no refresh pass, no old gradient, no attack."""
    config = with_parts(
        objective=dataclasses.replace(TINY.objective, name=objective),
        topology=TopologyConfig(name="static", sparsity=0.5),
        correction=CorrectionConfig(memory="snapshot", coefficient="constant"),
        steps_per_call=1,
    )
    _, steps, state = train.build(config, data)
    order = steps.order(state.key, state.epoch)
    refreshed = steps.refresh(copy(state), *data.train, steps.refresh_indices(order))
    assert same(refreshed.variables, state.variables) and not same(refreshed.opt_state, state.opt_state)

    first = steps.take(refreshed, *data.train, train.Order(*(rows[:1] for rows in order)))
    second = steps.take(copy(first), *data.train, train.Order(*(rows[1:2] for rows in order)))
    point = agent_optax.snapshot_params(first.opt_state, first.params)
    assert not same(point, first.params)  # the old gradient of the second step is taken elsewhere

    augment_key, attack_key = jax.random.split(_step_key(first))
    images = steps._augmented(augment_key, data.train.images[order.indices[1]])
    labels = data.train.labels[order.indices[1]]
    batch = steps.objective.prepare(first.params, first.variables, images, labels, attack_key)
    _, expected = steps.objective.network.training_logits(first.params, first.variables, images)
    if objective == "trades":  # both forward passes of its loss count, as in its authors' code
        _, expected = steps.objective.network.training_logits(first.params, expected, batch["attacked"])
    for left, right in zip(jax.tree.leaves(second.variables), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)  # compiled apart


def _step_key(state):
    key = state.key
    for number in (state.epoch, 3, state.epoch_step):
        key = jax.random.fold_in(key, number)
    return key


def test_attack_is_made_in_evaluation_mode(data):
    """Its result for a sample does not depend on the rest of the batch."""
    config = with_parts(objective=dataclasses.replace(TINY.objective, name="trades"))
    _, steps, state = train.build(config, data)
    images, labels = data.train.images[:8] / np.float32(255), data.train.labels[:8]
    other = np.concatenate([images[:4], 1 - images[4:]])
    attacked = [
        steps.objective.prepare(state.params, state.variables, batch, labels, jax.random.key(3))["attacked"]
        for batch in (images, other)
    ]
    np.testing.assert_allclose(attacked[0][:4], attacked[1][:4], rtol=0, atol=1e-6)
    assert not np.allclose(attacked[0][4:], attacked[1][4:])


def test_parts_of_an_epoch_from_the_host_give_the_same_steps(data):
    device = epochs(TINY, data)[1]
    host_config = with_parts(data=dataclasses.replace(TINY.data, placement="host"), steps_per_call=2)
    host = epochs(host_config, data)[1]
    assert same(device.key, host.key) and int(host.epoch_step) == 4
    for left, right in zip(jax.tree.leaves(device.params), jax.tree.leaves(host.params), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)  # compiled apart


@pytest.mark.parametrize("memory", ["snapshot", "table"])
def test_order_of_the_data(data, memory):
    config = with_parts(**FIXED, correction=CorrectionConfig(memory=memory, coefficient="constant"))
    _, steps, state = train.build(config, data)
    first, second = (steps.order(state.key, jnp.int32(epoch)) for epoch in range(2))
    for order in (first, second):
        assert order.indices.shape == (4, 8) and len(np.unique(order.indices)) == 32
    assert not np.array_equal(first.indices, second.indices)

    def batches(order):
        return {tuple(sorted(rows)) for rows in np.asarray(order.indices).tolist()}

    if memory == "snapshot":
        assert batches(first) != batches(second)
    else:
        assert batches(first) == batches(second)
        by_index = [np.asarray(steps.refresh_indices(order)) for order in (first, second)]
        np.testing.assert_array_equal(*by_index)
        for step, index in enumerate(np.asarray(second.batch_index)):
            np.testing.assert_array_equal(by_index[0][index], second.indices[step])


def test_cached_gradient_is_that_of_the_same_batch(data):
    """With the snapshot at the weights, the correction of each batch removes all that is its own: g^ is the mean."""
    config = with_parts(
        **FIXED,
        topology=TopologyConfig(name="dense"),
        correction=CorrectionConfig(memory="cached_snapshot", coefficient="constant"),
        optimizer=OptimizerConfig(momentum=0.0, nesterov=False, weight_decay=0.0),
    )
    _, steps, state = train.build(config, data)
    order = steps.order(state.key, state.epoch)
    state = steps.refresh(state, *data.train, steps.refresh_indices(order))
    after = [
        steps.take(copy(state), *data.train, train.Order(*(rows[i : i + 1] for rows in order))).params for i in range(4)
    ]
    mean_grads = optax.tree_utils.tree_get(state.opt_state, "mean_grads")
    for params in after:
        moved = jax.tree.map(lambda old, new, g: np.max(np.abs(old - 0.1 * g - new)), state.params, params, mean_grads)
        assert max(jax.tree.leaves(moved)) < 1e-6


def test_shift_and_reflection_of_images():
    images = jnp.arange(64 * 5 * 5 * 1, dtype=jnp.uint8).reshape(64, 5, 5, 1) + 1
    key = jax.random.key(0)
    np.testing.assert_array_equal(augment(key, images, shift=0, flip=False), images)
    moved = np.asarray(augment(key, images, shift=2, flip=False))
    offsets = set()
    for before, after in zip(np.asarray(images), moved, strict=True):
        padded = np.pad(before, ((2, 2), (2, 2), (0, 0)))
        found = [(i, j) for i in range(5) for j in range(5) if np.array_equal(padded[i : i + 5, j : j + 5], after)]
        assert found
        offsets.update(found)
    assert len(offsets) > 15  # of 25
    flipped = np.asarray(augment(key, images, shift=0, flip=True))
    is_mirrored = np.all(flipped == images[:, :, ::-1], axis=(1, 2, 3))
    is_same = np.all(flipped == images, axis=(1, 2, 3))
    assert np.all(is_mirrored != is_same) and 16 < np.sum(is_mirrored) < 48


def test_evaluation_counts_every_image_once(data):
    network, _, state = train.build(TINY, data)
    images = jnp.asarray(data.test.images) / 255
    logits = network.evaluation_logits(state.params, state.variables, images)
    expected = float(jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, data.test.labels)))
    accuracy = 100 * float(jnp.mean(jnp.argmax(logits, -1) == data.test.labels))

    class OnDemand:  # behaves like files that are decoded
        shape = data.test.images.shape

        def __getitem__(self, indices):
            return data.test.images[indices]

    for images in (data.test.images, jnp.asarray(data.test.images), OnDemand()):
        split = LabelledImages(images, data.test.labels)
        loss, right = evaluate(network, state.params, state.variables, split)
        assert loss == pytest.approx(expected, rel=1e-5) and right == pytest.approx(accuracy)


def test_tiny_vgg_trains():
    rng = np.random.default_rng(0)
    split = LabelledImages(rng.integers(0, 256, (8, 32, 32, 3), np.uint8), np.arange(8, dtype=np.int32) % 4)
    config = with_parts(
        data=DataConfig(name="cifar10", shift=4, flip=True),
        model=ModelConfig(name="vgg-c", width=1 / 32),
        topology=TopologyConfig(name="static", sparsity=0.8),
        correction=CorrectionConfig(memory="none"),
        batch_size=4,
    )
    _, state = epochs(config, DataSet(split, split, 4))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state.params, state.variables)))
    assert float(agent_optax.diagnostics(state.opt_state)["sparsity"]) == pytest.approx(0.8, abs=0.01)
