"""The examples run, say what they should, and read real data."""

import gzip
import importlib
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import matplotlib.image
import numpy as np
import pytest
import scipy.stats

pytestmark = pytest.mark.examples

EXAMPLES = Path(__file__).parents[1] / "examples"


def run_quickstart(*arguments: str) -> subprocess.CompletedProcess:
    env = os.environ | {"COLUMNS": "100", "PYTHONPATH": str(EXAMPLES.parent)}  # conftest.py set JAX's environment
    return subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / "quickstart.py"), *arguments],
        capture_output=True,
        text=True,
        env=env,
        cwd=EXAMPLES.parent,
        timeout=600,
    )


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports an example as Python does that runs one: with its folder on the path."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module
    for name in ("data", "quickstart"):
        sys.modules.pop(name, None)


def write_idx(path: Path, array: np.ndarray) -> None:
    content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def tiny_fashion_mnist(tmp_path: Path) -> dict[str, np.ndarray]:
    """Four IDX files in tmp_path, two of them gzipped, and what they hold."""
    rng = np.random.default_rng(0)
    arrays = {
        "train-images-idx3-ubyte.gz": rng.integers(0, 256, (70, 28, 28), np.uint8),
        "train-labels-idx1-ubyte": rng.integers(0, 10, 70, np.uint8),
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (20, 28, 28), np.uint8),
        "t10k-labels-idx1-ubyte.gz": rng.integers(0, 10, 20, np.uint8),
    }
    for name, array in arrays.items():
        write_idx(tmp_path / name, array)
    return arrays


def test_quickstart_compares_three_optimizers(tmp_path):
    plot = tmp_path / "new" / "curves.png"
    run = run_quickstart("--smoke", "--plot", str(plot))
    assert run.returncode == 0, run.stderr
    rows = {cells[0]: cells[1:] for cells in (re.split(r"\s{2,}", line.strip()) for line in run.stdout.splitlines())}

    assert all(name in run.stdout for name in ("SGD", "AGENT as published", "AGENT, gradient regression"))
    accuracies = [float(cell.split(" ± ")[0]) for cell in rows["epochs 2-2"]]
    assert len(accuracies) == 3 and all(30 < accuracy < 100 for accuracy in accuracies)  # chance is 10
    assert rows["gradients/epoch"] == ["1", "3.33", "3"]
    assert rows["sparsity"] == ["97.0000%"] * 3
    assert all(float(cell.rstrip("%")) > 3 for cell in rows["explored (R_s)"])  # more than the 3% that are active
    none, published, regression = rows["mean correlation"]
    assert none == "-" and float(published) == 0  # nothing is known before the second refresh is smoothed in
    assert 0.1 < float(regression) < 1

    height, width = matplotlib.image.imread(plot).shape[:2]
    assert width > 2 * height  # two panels


def test_quickstart_says_how_to_get_missing_data(tmp_path):
    run = run_quickstart("--dataset", "fashion_mnist", "--data-dir", str(tmp_path))
    assert run.returncode == 1
    assert f"{tmp_path} has no train-images-idx3-ubyte.gz" in run.stderr
    assert "apt-get install dataset-fashion-mnist" in run.stderr and "--data-dir FOLDER" in run.stderr
    assert "Traceback" not in run.stderr


def test_quickstart_reads_and_standardises_fashion_mnist(example, tmp_path, tiny_fashion_mnist):
    quickstart = example("quickstart")
    data = quickstart.load(quickstart.Config(dataset="fashion_mnist", data_dir=tmp_path))
    raw = tiny_fashion_mnist["train-images-idx3-ubyte.gz"].reshape(70, 784)
    np.testing.assert_allclose(data.train_images, (raw - raw.mean()) / raw.std(), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(data.train_labels, tiny_fashion_mnist["train-labels-idx1-ubyte"])
    np.testing.assert_array_equal(data.test_labels, tiny_fashion_mnist["t10k-labels-idx1-ubyte.gz"])
    assert data.test_images.shape == (20, 784) and data.test_images.dtype == np.float32


def test_fashion_mnist_keeps_the_first_images(example, tmp_path, tiny_fashion_mnist):
    data = example("data").load_fashion_mnist(tmp_path, num_train=5)
    raw = tiny_fashion_mnist["train-images-idx3-ubyte.gz"][:5].reshape(5, 784)
    np.testing.assert_allclose(data.train_images, raw / 255, rtol=1e-6)
    assert data.train_labels.shape == (5,) and len(data.test_labels) == 20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no IDX file"),
        (bytes([0, 0, 13, 1, 0, 0, 0, 1]) + b"\0\0\0\0", "no IDX file of unsigned bytes"),  # 13: floats
        (bytes([0, 0, 8, 1, 0, 0, 0, 4]) + b"abc", r"3 bytes of data where its header says \(4,\)"),
        (bytes([0, 0, 8, 3, 0, 0, 0, 4]), "its header says"),
    ],
)
def test_damaged_idx_file_is_an_error(example, tmp_path, content, message):
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        example("data").read_idx(path)


def test_labels_of_another_data_set_are_an_error(example, tmp_path, tiny_fashion_mnist):
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", tiny_fashion_mnist["train-labels-idx1-ubyte"])
    with pytest.raises(ValueError, match=r"images of shape \(20, 28, 28\) and labels of shape \(70,\)"):
        example("data").load_fashion_mnist(tmp_path)


def test_digits_are_split_once_and_for_all(example):
    data = example("data")
    digits, again = data.load_digits(), data.load_digits()
    assert digits.train_images.shape == (1297, 64) and digits.test_images.shape == (500, 64)
    assert digits.train_images.min() == 0 and digits.train_images.max() == 1
    np.testing.assert_array_equal(digits.test_images, again.test_images)
    shares = [np.bincount(labels) / len(labels) for labels in (digits.train_labels, digits.test_labels)]
    np.testing.assert_allclose(*shares, atol=2e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": 1}, "two seeds"),
        ({"epochs": 1}, "two epochs"),
        ({"data_dir": Path("folder")}, "add --dataset fashion_mnist"),
    ],
)
def test_config_that_makes_no_sense_is_an_error(example, settings, message):
    with pytest.raises(ValueError, match=message):
        example("quickstart").Config(**settings).completed()


def test_epochs_to_a_target_are_read_off_between_epochs(example):
    epochs_to = example("quickstart").epochs_to
    curve = np.array([50.0, 60.0, 80.0, 70.0])
    assert epochs_to(65.0, curve) == 2.25
    assert epochs_to(80.0, curve) == 3.0
    assert epochs_to(40.0, curve) == 1.0
    assert np.isnan(epochs_to(81.0, curve))


def test_paired_difference_is_students(example):
    rng = np.random.default_rng(0)
    baseline = rng.normal(80, 1, (5, 6))
    accuracy = baseline + rng.normal(1, 0.5, (5, 6))
    low, high = scipy.stats.ttest_1samp(np.mean(accuracy - baseline, axis=0), 0).confidence_interval(0.95)
    expected = f"{(low + high) / 2:+.2f} ± {(high - low) / 2:.2f}"
    paired_difference = example("quickstart").paired_difference
    assert paired_difference(accuracy, baseline) == expected
    assert paired_difference(baseline, baseline) == "-"


def test_larger_than_memory_rewires_and_prints_both_sizes(example, capsys):
    module = example("larger_than_memory")
    module.main(module.Config(width=64, num_layers=2, sparsity=0.9, num_steps=6, update_every=3, max_bytes=2**12))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "8,192 weights in dense layers, 896 parameters in sparse ones"
    grown = [int(line.split()[2].replace(",", "")) for line in lines if "grown" in line]
    assert len(grown) == 2 and min(grown) > 0
    losses = [float(line.split()[3]) for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    assert lines[-1].startswith("dense training would take 0.0 GB")
