"""Whole runs: what they write, Ctrl-C and resuming bit for bit, presets, and what is refused."""

import csv
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import matplotlib.image
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tyro
from training.checkpoints import Checkpoints
from training.config import Config, CorrectionConfig, DataConfig, ModelConfig, ObjectiveConfig, TopologyConfig
from training.journal import EpochRecord, Journal, read
from training.optimizer import build_optimizer, learning_rate_schedule
from training.plot import plot
from training.presets import presets

import agent_optax

pytestmark = pytest.mark.examples

EXAMPLES = Path(__file__).parents[2] / "examples"
RUN = (
    "digits --epochs 4 --batch-size 64 --data.num-train 640 --data.shift 1 --model.hidden 32 "
    "--topology.name rigl_itop --topology.sparsity 0.8 --topology.update-every 7 --topology.storage compact "
    "--correction.coefficient loss_regression --steps-per-call 2 --checkpoint-every 2"
).split()


SPARSE_LAYERS = (
    "digits --epochs 4 --batch-size 64 --data.num-train 640 --data.shift 1 --model.hidden 32 "
    "--topology.layers sparse --topology.group 4 --topology.name rigl --topology.sparsity 0.8 "
    "--topology.update-every 5 --topology.candidates 2 --checkpoint-every 1"
).split()


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Runs share what they compile."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    library = str(Path(agent_optax.__file__).parents[1])
    return os.environ | cache | {"COLUMNS": "120", "PYTHONPATH": library, "PYTHONUNBUFFERED": "1"}


def start(environment, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-W", "error", str(EXAMPLES / "train.py"), *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=EXAMPLES.parent
    )


def run(environment, *arguments: str) -> subprocess.CompletedProcess:
    process = start(environment, *arguments)
    out, err = process.communicate(timeout=600)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


@pytest.fixture(scope="module")
def whole_run(environment, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    process = run(environment, *RUN, "--out", str(out))
    assert process.returncode == 0, process.stderr
    assert "digits: 640 images for training, 500 for tests" in process.stdout
    assert "rigl_itop at 80%, compact storage" in process.stdout
    return out


def arrays_of(out: Path) -> dict[str, np.ndarray]:
    """Everything in the last checkpoint, by its path."""
    with ocp.CheckpointManager(out / "checkpoints") as manager:
        tree = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore())
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path): np.asarray(
            jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        )
        for path, leaf in leaves
    }


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open(newline="") as file:
        return [{name: cell for name, cell in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def test_run_learns_and_writes_what_it_says(whole_run):
    with (whole_run / "metrics.csv").open(newline="") as file:
        assert next(csv.reader(file)) == list(EpochRecord._fields)
    records = read(whole_run / "metrics.csv")
    assert [record.epoch for record in records] == [1, 2, 3, 4]
    last = records[-1]
    assert last.test_accuracy > 40 and last.train_loss < records[0].train_loss  # chance is 10
    assert last.sparsity == pytest.approx(0.8, abs=0.01) and last.exploration_rate > 0.2
    assert records[0].correlation == 0 and 0 < last.correlation <= 1  # c begins at 0, and has refreshed
    assert last.correction_weight == pytest.approx(0.1 * last.correlation, rel=1e-5)
    assert [round(record.learning_rate, 6) for record in records] == [0.1, 0.1, 0.01, 0.001]

    (events,) = (whole_run / "tensorboard").iterdir()
    content = events.read_bytes()
    assert all(content.count(b"\x0a" + bytes([len(n)]) + n) == 4 for n in (b"test_loss", b"correlation"))
    assert matplotlib.image.imread(whole_run / "curves.png").std() > 0
    assert json.loads((whole_run / "config.json").read_text())["topology"]["sparsity"] == 0.8
    assert sorted(int(path.name) for path in (whole_run / "checkpoints").iterdir() if path.name.isdigit()) == [20, 40]


@pytest.mark.parametrize("in_epoch", [0, 2])
def test_interrupted_run_goes_on_bit_for_bit(environment, whole_run, tmp_path, in_epoch):
    out = tmp_path / "run"
    process = start(environment, *RUN, "--out", str(out))
    deadline = time.monotonic() + 500
    while time.monotonic() < deadline and process.poll() is None:
        # Early: once training has begun. Late: as soon as the second epoch is written.
        if (out / "metrics.csv").is_file() and len(read(out / "metrics.csv")) >= in_epoch:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=500)
    assert process.returncode == 130 and "Traceback" not in stderr, stderr
    saved = re.search(r"Interrupted and saved after epoch (\d), step (\d+)", stdout)
    assert saved, stdout
    assert in_epoch <= int(saved[1]) < 4
    assert len(rows_of(out)) == int(saved[1])

    resumed = run(environment, *RUN, "--out", str(out), "--resume")
    assert resumed.returncode == 0, resumed.stderr
    expected, found = arrays_of(whole_run), arrays_of(out)
    assert expected.keys() == found.keys()
    assert any("batch_stats" in name for name in found) and any("opt_state" in name for name in found)
    assert [name for name in expected if expected[name].tobytes() != found[name].tobytes()] == []
    assert rows_of(out) == rows_of(whole_run)


def test_run_with_sparse_layers_resumes_bit_for_bit(environment, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    process = run(environment, *SPARSE_LAYERS, "--out", str(whole))
    assert process.returncode == 0, process.stderr
    assert "rigl at 80%, sparse layers" in process.stdout
    assert read(whole / "metrics.csv")[-1].test_accuracy > 25  # chance is 10; groups of 4 cost much in so small a layer
    process = start(environment, *SPARSE_LAYERS, "--out", str(parts))
    deadline = time.monotonic() + 500
    while time.monotonic() < deadline and process.poll() is None:
        if (parts / "metrics.csv").is_file() and len(read(parts / "metrics.csv")) >= 2:
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.02)
    process.communicate(timeout=600)
    process = run(environment, *SPARSE_LAYERS, "--out", str(parts), "--resume")
    assert process.returncode == 0, process.stderr
    expected, found = arrays_of(whole), arrays_of(parts)
    assert any("connections" in name for name in expected)
    assert rows_of(whole) == rows_of(parts)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_finished_run_is_not_trained_again(environment, whole_run):
    before = (whole_run / "metrics.csv").read_text()
    again = run(environment, *RUN, "--out", str(whole_run), "--resume")
    assert again.returncode == 0 and "; 4 done" in again.stdout
    assert (whole_run / "metrics.csv").read_text() == before


def test_another_run_is_not_overwritten(whole_run):
    config = tyro.extras.overridable_config_cli(presets(), args=[*RUN, "--out", str(whole_run)])
    with pytest.raises(FileExistsError, match="holds a run: add --resume"):
        Checkpoints(config)
    message = r"was started with --model\.hidden \[32\] \(now \[300, 100\]\), --seed 0 \(now 1\): resume with the same"
    with pytest.raises(ValueError, match=message):
        Checkpoints(dataclasses.replace(config, seed=1, model=ModelConfig(), resume=True))
    Checkpoints(dataclasses.replace(config, checkpoint_every=3, resume=True)).close()


def test_rows_after_the_last_checkpoint_are_written_anew(tmp_path):
    def record(epoch, loss):
        return EpochRecord(epoch, 1.0, 0.1, loss, 50.0, loss, 50.0, None, None, None, 0.9, 0.125)

    journal = Journal(tmp_path, 0)
    for epoch in (1, 2, 3):
        journal.write(record(epoch, 1 / 3))
    journal.close()
    resumed = Journal(tmp_path, 2)
    resumed.write(record(3, 0.1 + 0.2))
    resumed.close()
    assert read(tmp_path / "metrics.csv") == [record(1, 1 / 3), record(2, 1 / 3), record(3, 0.1 + 0.2)]
    assert len(rows_of(tmp_path)) == 3
    fresh = Journal(tmp_path, 0)
    fresh.close()
    assert read(tmp_path / "metrics.csv") == []


def test_plot_of_one_epoch_without_correction(tmp_path):
    plot([EpochRecord(1, 1.0, 0.1, 1.0, 50.0, 1.0, 50.0, None, None, None, None, None)], "x", tmp_path / "x.png")
    assert matplotlib.image.imread(tmp_path / "x.png").std() > 0


def test_presets_have_the_settings_of_the_paper():
    named = presets()
    for name in ("rigl-itop-vgg-c-cifar10-99", "set-itop-resnet-34-cifar100-90", "a-set-itop-vgg-c-cifar10-80"):
        assert name in named
    _, config = named["a-rigl-itop-vgg-c-cifar10-99"]
    assert config.topology == TopologyConfig(name="rigl_itop", sparsity=0.99, update_every=4000)
    assert config.correction == CorrectionConfig("snapshot", "loss_regression", scaling=0.1, smoothing=0.3)
    assert (config.batch_size, config.epochs, config.optimizer.momentum) == (128, 250, 0.9)
    assert config.optimizer.weight_decay == 5e-4
    rate = learning_rate_schedule(config, 1000)
    assert [round(float(rate(step)), 6) for step in (0, 499, 501, 749, 751, 999)] == [
        0.1,
        0.1,
        0.01,
        0.01,
        0.001,
        0.001,
    ]
    assert named["rigl-itop-vgg-c-cifar10-99"][1].correction.memory == "none"

    _, bsr_net = named["a-bsr-net-vgg-16-cifar10-99-adversarial"]
    assert bsr_net.topology == TopologyConfig(name="bayesian_rewiring", sparsity=0.99)
    objective = bsr_net.objective
    assert (objective.name, objective.num_steps, objective.robust_steps, objective.robust_restarts) == (
        "at",
        10,
        50,
        10,
    )
    assert (objective.epsilon, objective.step_size) == (8 / 255, 2 / 255) and bsr_net.optimizer.decoupled
    rate = learning_rate_schedule(bsr_net, 1000)
    assert [round(float(rate(step)), 6) for step in (0, 249, 251, 499, 501)] == [0.1, 0.1, 0.01, 0.01, 0.0005]


def test_every_preset_builds_its_optimizer():
    for name, (_, config) in presets().items():
        assert config.out == Path("runs") / name
        build_optimizer(config, 390, jax.random.key(0))


def test_flags_change_a_preset():
    arguments = "a-rigl-itop-vgg-c-cifar10-99 --epochs 7 --topology.storage compact --data.data-dir x".split()
    config = tyro.extras.overridable_config_cli(presets(), args=arguments)
    assert config.epochs == 7 and config.topology.storage == "compact" and config.topology.sparsity == 0.99
    assert config.data.data_dir == Path("x") and config.model.name == "vgg-c"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"data": {"shift": -1}}, "--data.shift must not be negative, got -1"),
        ({"data": {"name": "digits", "data_dir": Path("x")}}, "need no --data.data-dir x"),
        ({"data": {"name": "digits", "from_hub": True}}, "no use to digits"),
        ({"data": {"name": "cifar10", "from_hub": True, "data_dir": Path("x")}}, "two sources"),
        ({"data": {"name": "image_folder"}}, "add --data.placement host"),
        ({"model": {"width": 0.0}}, "must be positive, got 0.0"),
        ({"model": {"name": "vgg-c", "stem": "imagenet"}}, "for ResNets, not for vgg-c"),
        ({"topology": {"name": "rigl_itop", "drop_fraction": 0.3}}, "0.3 is of no use to rigl_itop"),
        ({"topology": {"name": "static", "update_every": 5}}, "no use to static, which changes never"),
        ({"topology": {"name": "bayesian_rewiring", "update_every": 5}}, "changes at every step"),
        ({"topology": {"name": "gradual_pruning", "storage": "compact"}}, "gradual_pruning changes it"),
        ({"optimizer": {"milestones": (0.5,)}}, r"decays needs a positive number for each.*got \(0.1, 0.01\)"),
        ({"topology": {"name": "dense", "storage": "compact"}}, "with --topology.name dense all are active"),
        ({"topology": {"name": "set", "grow_by": "corrected"}}, "set does not grow by gradients"),
        ({"topology": {"name": "rigl", "grow_by": "corrected", "storage": "compact"}}, "compact does not hold"),
        ({"topology": {"name": "snfs", "layers": "sparse"}}, "not for snfs"),
        ({"topology": {"name": "rigl", "layers": "sparse", "storage": "compact"}}, "takes no --topology.storage"),
        ({"topology": {"name": "rigl", "group": 4}}, "--topology.group 4 is for --topology.layers sparse"),
        ({"topology": {"name": "rigl", "candidates": 1.0}}, "--topology.candidates 1.0 must be positive, and is for"),
        ({"correction": {"memory": "table", "refresh_batches": 5}}, "table has no refresh pass"),
        ({"correction": {"memory": "cached_snapshot", "refresh_batches": 5}}, "needs all of them"),
        ({"correction": {"coefficient": "gradient_regression", "initial": 0.5}}, "starts at 1"),
        ({"objective": {"name": "trades", "attacked_fraction": 0.5}}, "trades has its own mixture"),
        ({"objective": {"robust_images": -1}}, "got -1"),
        ({"optimizer": {"milestones": (0.5, 1.5)}}, r"between 0 and 1, got \(0.5, 1.5\)"),
        ({"epochs": 0}, "--epochs must be 1 or more, got 0"),
        ({"steps_per_call": 0}, "--steps-per-call must be 1 or more, got 0"),
        ({"correction": {"memory": "cached_snapshot"}}, "images must not change"),
    ],
)
def test_impossible_settings_are_refused_at_construction(parts, message):
    classes = {field.name: type(getattr(Config(), field.name)) for field in dataclasses.fields(Config)}
    with pytest.raises(ValueError, match=message):
        Config(**{name: classes[name](**part) if isinstance(part, dict) else part for name, part in parts.items()})


def test_attacked_images_are_not_cached():
    still = DataConfig(shift=0, flip=False)
    Config(data=still, correction=CorrectionConfig(memory="cached_snapshot"))
    with pytest.raises(ValueError, match="images must not change"):
        Config(data=still, correction=CorrectionConfig(memory="cached_snapshot"), objective=ObjectiveConfig("at"))


def test_topology_that_would_never_change_is_an_error():
    config = Config(model=ModelConfig(), topology=TopologyConfig("rigl_itop"), epochs=2)
    with pytest.raises(ValueError, match=r"never change in 20 steps with --topology\.update-every 1500"):
        build_optimizer(config, 10, jax.random.key(0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("digits --batch-size 2000", "--batch-size 2000 is more than the 1297 training images"),
        ("digits --resume --out {out}", "holds no checkpoint to resume from"),
        ("rigl-itop-vgg-c-cifar10-99", "name their folder with --data.data-dir"),
        ("digits --epochs 0", "--epochs must be 1 or more"),
    ],
)
def test_mistakes_are_explained_without_a_traceback(monkeypatch, capsys, tmp_path, arguments, message):
    import train

    monkeypatch.setattr(sys, "argv", ["train.py", *arguments.format(out=tmp_path / "run").split()])
    with pytest.raises(SystemExit) as refused:
        train.main(train.parse())
    said = f"{refused.value.code} {''.join(capsys.readouterr())}"
    assert message in " ".join(re.sub("[│╭╮╰╯─]", "", said).split()) and refused.value.code != 0
