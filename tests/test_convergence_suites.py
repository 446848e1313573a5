"""Every suite of benchmarks/convergence.py runs in small, and what it reads off its runs is right."""

import csv
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
import scipy.stats

import agent_optax

pytestmark = pytest.mark.benchmarks

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def convergence() -> Iterator[None]:
    """Makes `convergence` importable, as it is to benchmarks/convergence.py."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))
    for name in [name for name in sys.modules if name.split(".")[0] == "convergence"]:
        del sys.modules[name]


def load(name: str):
    return importlib.import_module(f"convergence.{name}")


@pytest.fixture(scope="module")
def smoke_folder(tmp_path_factory, convergence) -> Path:
    """Files of all suites in small; one process, so that what two suites share is compiled once."""
    spec = importlib.util.spec_from_file_location("convergence_script", BENCHMARKS / "convergence.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # dataclasses look their module up
    spec.loader.exec_module(script)
    folder = tmp_path_factory.mktemp("suites")
    script.main(script.Config(suite="all", smoke=True, output=folder, keep=folder / "runs"))
    return folder


def test_every_suite_writes_curves_tables_and_a_figure(smoke_folder):
    suites = load("suites").SUITES
    assert {"r9", "baselines", "ablations", "adversarial", "budgets"} <= set(suites)
    for name, suite in suites.items():
        small = load("suite").smoke_sized(suite, load("images").available())
        with (smoke_folder / f"{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        expected = {(m, str(s), str(e)) for m in small.cases[0].methods for s in range(2) for e in (1, 2)}
        assert {(row["method"], row["seed"], row["epoch"]) for row in rows} == expected
        assert all(0 < float(row["accuracy"]) <= 100 for row in rows)
        text = (smoke_folder / f"{name}.md").read_text()
        assert f"--suite {name} --smoke`" in text
        assert suite.title in text and all(f"| {method} |" in text for method in small.cases[0].methods)
        height, width = matplotlib.image.imread(smoke_folder / f"{name}.png").shape[:2]
        assert width > 2 * height


def test_smoke_counts_evaluations(smoke_folder):
    with (smoke_folder / "r9.csv").open() as file:
        spent = {row["method"]: float(row["evaluations"]) for row in csv.DictReader(file) if row["epoch"] == "2"}
    assert spent == {"SGD": 2, "gradient regression": 6}  # two epochs of one gradient, and of three


def test_adversarial_smoke_measures_robustness_and_counts_the_attack(smoke_folder):
    with (smoke_folder / "adversarial.csv").open() as file:
        last = [row for row in csv.DictReader(file) if row["epoch"] == "2"]
    for row in last:
        assert 0 <= float(row["robust_accuracy"]) <= float(row["accuracy"]) + 5  # of the first images only
    assert {row["method"]: float(row["evaluations"]) for row in last} == {
        "SGD": 2 * (1 + 2),
        "gradient regression, attacked mean": 2 * ((2 + 2) + (1 + 2)),
    }


def test_csv_is_read_back(smoke_folder, tmp_path):
    report = load("report")
    for name in ("r9", "variance-and-correlation"):
        results, seeds = report.read_csv(smoke_folder / f"{name}.csv")
        assert seeds == (0, 1)
        report.write_csv(tmp_path / "again.csv", results, seeds)
        assert (tmp_path / "again.csv").read_text() == (smoke_folder / f"{name}.csv").read_text()


def test_runs_that_are_kept_are_not_run_again(smoke_folder, monkeypatch):
    suite, workers = load("suite"), load("workers")
    small = suite.smoke_sized(load("suites").SUITES["r9"], load("images").available())
    case = small.cases[0]
    jobs = [workers.Job(method, case.setting, (0, 1)) for method in case.methods]
    monkeypatch.setattr(workers, "train", lambda *job: pytest.fail(f"{job} ran again"))
    runs = workers.run_all(jobs, 0, lambda job: None, smoke_folder / "runs")
    assert [len(runs[job]) for job in jobs] == [2, 2]


def test_paired_difference_is_students():
    rng = np.random.default_rng(0)
    baseline = rng.normal(80, 1, 6)
    values = baseline + rng.normal(1, 0.5, 6)
    interval = load("comparison").paired_difference(values, baseline)
    low, high = scipy.stats.ttest_rel(values, baseline).confidence_interval(0.95)
    np.testing.assert_allclose([interval.mean - interval.margin, interval.mean + interval.margin], [low, high])
    with pytest.raises(ValueError, match="two seeds"):
        load("comparison").paired_difference(values[:1], baseline[:1])


def test_costs_are_read_off_between_epochs():
    cost_to = load("comparison").cost_to
    accuracy = np.array([[49.0, 59.0, 79.0, 69.0], [51.0, 61.0, 81.0, 71.0]])
    epochs = np.arange(1, 5)
    assert cost_to(65.0, accuracy, epochs) == 2.25
    assert cost_to(65.0, accuracy, 3 * epochs) == 6.75
    assert cost_to(80.0, accuracy, epochs) == 3.0
    assert cost_to(40.0, accuracy, epochs) == 1.0
    assert np.isnan(cost_to(81.0, accuracy, epochs))


def test_methods_count_their_evaluations():
    methods, setting = load("methods").METHODS, load("setting").Setting()
    counted = {name: method.evaluations(setting) for name, method in methods.items()}
    assert counted["SGD"] == counted["table, gradient regression"] == 1
    assert counted["gradient regression, cached"] == counted["SGD, 2x batch"] == counted["SGD, 2x epochs"] == 2
    assert counted["gradient regression"] == counted["SVRG"] == 3
    assert counted["AGENT as published"] == pytest.approx(3 + 1 / 3)
    assert counted["gradient regression, 10% sub-sample"] == pytest.approx(2.1)
    assert counted["cached, a refresh every 2 epochs"] == 1.5


def test_every_suite_names_methods_that_exist():
    methods = load("methods").METHODS
    for suite in load("suites").SUITES.values():
        named = {name for case in suite.cases for name in case.methods} | set(suite.smoke_methods)
        assert named <= set(methods), suite.name


def test_the_same_seed_visits_the_same_images():
    training, methods = load("training"), load("methods").METHODS
    setting = load("setting").Setting(dataset="digits", num_train=320)
    orders = [training._Order(methods[name], setting, seed=3) for name in ("SGD", "gradient regression")]
    for order in orders:
        order.start_epoch(2)
    np.testing.assert_array_equal(orders[0].batches, orders[1].batches)
    assert np.array_equal(np.sort(orders[0].batches, axis=None), np.arange(320))
    fixed = training._Order(methods["table, gradient regression"], setting, seed=3)
    before = {i: tuple(b) for i, b in zip(fixed.batch_index, fixed.batches, strict=True)}
    fixed.start_epoch(1)
    after = {i: tuple(b) for i, b in zip(fixed.batch_index, fixed.batches, strict=True)}
    assert before == after and list(before) != list(after)


def corrected_by(coefficient, epochs):
    """Coefficients [E, T] over epochs of (grads [T, D], old_grads [T, D]); each begins with a mean gradient of 0."""
    tx = agent_optax.correct_gradients(agent_optax.snapshot(), coefficient, scaling=1.0)
    params = jnp.zeros(epochs[0][0].shape[1])
    state, used = tx.init(params), []
    for grads, old_grads in epochs:
        state = agent_optax.refresh(lambda params, batch: jnp.sum(params * batch), params, state, jnp.zeros((1, 1)))
        for new, old in zip(grads, old_grads, strict=True):
            state = tx.update(jnp.asarray(new), state, params, old_grads=jnp.asarray(old))[1]
            used.append(float(agent_optax.diagnostics(state)["correlation"]))
    return np.array(used).reshape(len(epochs), -1)


def test_coefficient_by_position_is_the_slope_of_the_same_part_of_the_epoch_before():
    rng = np.random.default_rng(0)
    old_grads = rng.normal(size=(2, 16, 3)).astype(np.float32)
    grads = np.linspace(0.9, 0.1, 16, dtype=np.float32)[:, None] * old_grads  # worth less the further from the snapshot
    epochs = [(new + 0.1, old) for new, old in zip(grads, old_grads, strict=True)]
    used = corrected_by(load("coefficients").ByPosition(steps_an_epoch=16, parts=4), epochs)
    new, old = (np.reshape(array, (4, 12)) for array in epochs[0])
    slopes = np.sum(new * old, axis=1) / np.sum(old**2, axis=1)
    np.testing.assert_allclose(used[1].reshape(4, 4).T, np.broadcast_to(slopes, (4, 4)), rtol=1e-4)
    assert np.all(np.diff(slopes) < 0)


def test_bias_aware_coefficient_is_covariance_over_variance_and_squared_bias():
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(400, 5)).astype(np.float32)
    bias = np.array([2, 0, 0, 0, 0], np.float32)
    new, old = 0.8 * noise + 3 * bias, noise + bias  # means that have nothing to do with the noise
    used = corrected_by(load("coefficients").BiasAware(), [(new, old)])[0, -1]
    weights = 0.98 ** np.arange(399, -1, -1.0)
    weights /= weights.sum()
    new_mean, old_mean = weights @ new, weights @ old
    covariance = weights @ np.sum((new - new_mean) * (old - old_mean), axis=1)
    variance = weights @ np.sum((old - old_mean) ** 2, axis=1)
    assert used == pytest.approx(covariance / (variance + np.sum(old_mean**2)), abs=1e-4)
    assert 0.3 < used < 0.6  # 0.8 * 5 / (5 + 4) in expectation; the plain slope would be clipped to 1
