"""The example of adversarial training runs, and does what its docstring says."""

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import agent_optax
from agent_optax import analysis

pytestmark = pytest.mark.examples

EXAMPLES = Path(__file__).parents[1] / "examples"


def run_example(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / "adversarial_training.py"), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "120", "PYTHONPATH": str(EXAMPLES.parent)},
        cwd=EXAMPLES.parent,
        timeout=600,
    )


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The example imported as Python does that runs it: with its folder on the path."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module("adversarial_training")
    for name in ("data", "quickstart", "adversarial_training"):
        sys.modules.pop(name, None)


def test_it_compares_three_methods():
    run = run_example("--smoke")
    assert run.returncode == 0, run.stderr
    rows = {cells[0]: cells[1:] for cells in (re.split(r"\s{2,}", line.strip()) for line in run.stdout.splitlines())}
    assert [rows["SGD"][i] for i in (1, 3, 4, 5)] == ["-"] * 4
    for name in ("SGD", "AGENT, scaling 0.1", "gradient regression, scaling 1"):
        clean, robust = (float(rows[name][i].split(" ± ")[0]) for i in (0, 2))
        assert clean > 30 and 5 < robust < clean  # chance is 10
    published, regression = (
        [float(cell) for cell in rows[name][4:]] for name in ("AGENT, scaling 0.1", "gradient regression, scaling 1")
    )
    assert 0.8 < published[0] <= 1 and published[1] < 0.02  # a tenth of the weight at most, a hundredth of the bias
    assert regression[0] < published[0] and 0.02 < regression[1] <= regression[0]
    assert "Sparsity after training: 90.0000%" in run.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seeds", "1"), "two seeds at least, got --seeds 1"),
        (("--data-dir", "somewhere"), "--data-dir somewhere is of no use to digits"),
        (("--batch-size", "5000"), "--batch-size 5000 is more than the 1297 training images"),
    ],
)
def test_mistakes_get_a_sentence(example, arguments, message):
    config = example.tyro.cli(example.Config, args=list(arguments))
    with pytest.raises(SystemExit, match=message):
        example.main(config)


@pytest.fixture
def start(example):
    """`(config, params, batch)` of the example's network and digits."""
    config = example.Config(smoke=True).completed()
    data = example.load(config)
    params = example.init_params(jax.random.key(0), data.train_images.shape[1])
    images = jnp.asarray(data.train_images[:32])
    return config, params, example.Batch(images, images, jnp.asarray(data.train_labels[:32]))


@pytest.mark.parametrize("name", ["pgd", "trades"])
def test_attacks_stay_close_and_raise_the_loss(example, start, name):
    config, params, clean = start
    loss_fn, attack = example.objective(example.dataclasses.replace(config, objective=name))
    attacked = clean._replace(attacked=attack(params, clean.images, clean.labels, 0))
    assert float(jnp.abs(attacked.attacked - clean.images).max()) <= config.epsilon + 1e-6
    assert float(attacked.attacked.min()) >= 0 and float(attacked.attacked.max()) <= 1
    assert loss_fn(params, attacked) > 1.01 * loss_fn(params, clean)


def test_on_clean_images_both_objectives_have_the_same_gradient(example, start):
    """So the mean gradient of a refresh is that of clean cross-entropy under either."""
    _, params, clean = start
    gradients = [jax.grad(loss_fn)(params, clean) for loss_fn in (example.pgd_loss, example.trades_loss)]
    for pgd, trades in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(pgd, trades, rtol=1e-4, atol=1e-6)


def test_one_attacked_batch_for_both_gradients_is_what_correlates(example, start):
    """Attacked once, gradients at two points correlate more than when each point has an attack of its own."""
    _, params, clean = start
    loss_fn, attack = example.objective(example.Config(epsilon=0.3))
    old_params = analysis.perturb(params, 0.3, 1)
    images, labels = clean.images.reshape(8, 4, -1), clean.labels.reshape(8, 4)

    def attacked_at(point, seed):
        keys = jax.random.split(jax.random.key(seed), 8)
        return jax.vmap(attack, (None, 0, 0, 0))(point, images, labels, keys)

    def old_and_new_loss(points, batch):
        """Of two points as one tree: the batch holds what each sees."""
        return sum(loss_fn(point, b) for point, b in zip(points, batch, strict=True))

    here = example.Batch(images, attacked_at(params, 0), labels)
    there = example.Batch(images, attacked_at(old_params, 1), labels)
    together = analysis.gradient_correlation(loss_fn, params, old_params, here).correlation
    gradients = jax.vmap(jax.grad(old_and_new_loss), (None, 0))((params, old_params), (here, there))
    new, old = (
        np.concatenate([np.reshape(leaf, (8, -1)) for leaf in jax.tree.leaves(tree)], axis=1) for tree in gradients
    )
    new, old = new - new.mean(axis=0), old - old.mean(axis=0)
    apart = (new * old).sum() / np.sqrt((new**2).sum() * (old**2).sum())
    assert float(together) > apart + 0.02


def test_scaling_a_tenth_is_a_hundredth_of_the_bias(example, start):
    """The bias of a clean mean gradient goes with the square of the weight."""
    config, params, clean = start
    loss_fn, attack = example.objective(config)
    batches = jax.tree.map(lambda leaf: leaf.reshape(4, 8, *leaf.shape[1:]), clean)
    attacked = batches._replace(
        attacked=jax.vmap(attack, (None, 0, 0, 0))(
            params, batches.images, batches.labels, jax.random.split(jax.random.key(0), 4)
        )
    )
    ratios = []
    for scaling in (0.1, 1.0):
        tx = agent_optax.correct_gradients(agent_optax.snapshot(), agent_optax.constant(1.0), scaling)
        tx = optax.chain(tx, optax.sgd(0.1))
        opt_state = agent_optax.refresh(loss_fn, params, tx.init(params), batches)
        ratios.append(float(analysis.estimator_error(loss_fn, params, opt_state, attacked).bias_ratio))
    assert ratios[1] > 0.01
    assert ratios[0] == pytest.approx(ratios[1] / 100, rel=1e-3)
