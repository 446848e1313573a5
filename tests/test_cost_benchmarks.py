"""The benchmarks of cost run in small, write what they measured, and read collectives off a program correctly.

No test looks at a time.
"""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import optax
import pytest

import agent_optax

pytestmark = pytest.mark.benchmarks

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NAMES = (
    "accelerator",
    "interleaved",
    "networks",
    "overhead",
    "memory",
    "topology_update",
    "scaling",
    "stagger",
    "start_up",
    "peers",
    "sparse_layers",
)


@pytest.fixture(scope="module", autouse=True)
def benchmarks() -> Iterator[None]:
    """Makes the scripts importable, as they are to each other."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))
    for name in NAMES:
        sys.modules.pop(name, None)


def load(name: str):
    return importlib.import_module(name)


def run(name: str, tmp_path: Path, **settings) -> dict:
    """The report of a smoke run."""
    script = load(name)
    output = tmp_path / "results" / f"{name}.json"
    script.main(script.Config(smoke=True, output=output, **settings))
    return json.loads(output.read_text())


def test_overhead(tmp_path):
    report = run("overhead", tmp_path, select=("RigL, table, compact", "history, constant, no sparsity"))
    rows = {row["optimizer"]: row for row in report["rows"]}
    assert set(rows) == {"sgd", "RigL, table, compact", "history, constant, no sparsity"}
    for row in rows.values():
        assert row["optimizer_ms"] > 0 and row["train_ms"] > 0
    compiled = run("overhead", tmp_path, select=("static, sgd, dense",), stages=("compile",))["rows"]
    assert [(row["optimizer"], row["kernels"]) for row in compiled[2:]] == [("sgd", 2), ("static, sgd, dense", 2)]
    assert all(row["step_s"] > 0 and row["init_s"] > 0 and row["step_lines"] > 10 for row in compiled)
    assert rows["sgd"]["optimizer_ratio"] == rows["sgd"]["train_ratio"] == 1
    assert report["versions"] == {m.__name__: m.__version__ for m in (jax, optax, agent_optax)}
    assert report["settings"]["sparsities"] == [0.9]


def test_overhead_has_every_memory_in_every_storage():
    names = set(load("overhead").optimizers(0.9))
    for memory in ("AGENT", "gradient regression", "cached snapshot", "recursion", "table", "history"):
        assert {f"RigL, {memory}, dense", f"RigL, {memory}, compact", f"{memory}, no sparsity"} <= names


def test_select_says_what_there_is():
    overhead = load("overhead")
    with pytest.raises(ValueError, match=r"--select RigX fits none of these: sgd; adamw; static, sgd, dense"):
        overhead.selected(overhead.Config(select=("RigX",)), 0.9)


def test_memory(tmp_path):
    report = run("memory", tmp_path, select=("RigL, sgd, compact", "table, no sparsity"))
    rows = {row["optimizer"]: row for row in report["rows"]}
    assert rows["sgd"]["state"] == 1  # momentum
    # A free row and one of each batch, sums and ages, momentum.
    num_batches = load("overhead").NUM_BATCHES
    assert rows["table, no sparsity"]["state"] == pytest.approx(num_batches + 4, rel=0.01)
    assert rows["RigL, sgd, compact"]["state"] < 0.1
    assert rows["sgd"]["peak"] == pytest.approx(3, rel=0.01)  # parameters, momentum, gradients


def test_a_second_gradient_counts_where_the_memory_wants_one():
    memory, overhead = load("memory"), load("overhead")
    params = {"kernel": jnp.ones((4, 4))}
    wants = {n: memory.needs_old_grads(tx.init(params)) for n, tx in overhead.corrections().items()}
    assert {name for name, wanted in wants.items() if wanted} == {"AGENT", "gradient regression", "recursion"}


def test_accelerator(monkeypatch, capsys):
    script = load("accelerator")
    for name, value in {"ROUNDS": 1, "CALLS": 1, "SPARSITIES": (0.9,), "NUM_PARAMS": (3000,)}.items():
        monkeypatch.setattr(script, name, value)
    script.ordinary_steps(3000)
    script.topology_update("dense")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines][1:3] == [
        "0.003M, RigL, sgd, dense, 90%",
        "0.003M, RigL, sgd, compact, 90%",
    ]
    assert lines[-1].startswith("step with a topology update, dense")


def test_topology_update(tmp_path):
    rows = {row["step"]: row for row in run("topology_update", tmp_path)["rows"]}
    assert rows["argsort"]["argsort_over_this"] == 1
    assert {"step with RigL update, compact", "step with SET update, compact"} <= set(rows)


def test_sparse_layers(tmp_path):
    rows = run("sparse_layers", tmp_path, momentum=0.9)["rows"]
    names = ["dense", "fan_in:8, 90.0%", "any_mask, 90.0%"]
    drawn = [f"{name}, 1 candidates a weight" for name in names[1:]]
    exported = ["to_bcsr, 90.0%", "to_bcoo, 90.0%"]
    expected = {"mlp": names, "rewire": names + drawn, "conv": names, "forward": names + exported}
    assert {(row["stage"], row["layer"]) for row in rows} == {(s, n) for s, own in expected.items() for n in own}
    assert all(row["ms"] > 0 and row["ratio"] > 0 for row in rows)
    with pytest.raises(ValueError, match="got 'fan_in'"):
        run("sparse_layers", tmp_path, layers=("fan_in",))


def test_the_selections_that_are_compared_agree():
    select = load("topology_update").SELECTIONS
    scores = jax.random.normal(jax.random.key(0), (40, 30))
    masks = [np.asarray(function(scores, 100)) for function in select.values()]
    assert masks[0].sum() == 100
    for mask in masks[1:]:
        np.testing.assert_array_equal(mask, masks[0])


def test_scaling(tmp_path):
    report = run("scaling", tmp_path, plot=tmp_path / "scaling.png")
    rows = {row["step"]: row for row in report["rows"]}
    scaling = load("scaling")
    assert {row["devices"] for row in rows.values()} == {2}
    assert rows["sgd"]["sent"] == []
    update = rows["rigl update"]
    assert scaling.bytes_sent(update, in_topology_update=False) == 0
    assert {s["kind"] for s in update["sent"]} == {"all-reduce"}
    assert max(s["largest"] for s in update["sent"]) < 100  # scalars, no array
    assert (tmp_path / "scaling.png").stat().st_size < 150_000
    height, width = matplotlib.image.imread(tmp_path / "scaling.png").shape[:2]
    assert width > 2 * height


HLO = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner (c: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %c = (s32[], f32[8,4]{1,0}) parameter(0)
  %x = f32[8,4]{1,0} get-tuple-element(%c), index=1
  %count = s32[] get-tuple-element(%c), index=0
  %r = (s32[], f32[8,4]{1,0}) all-reduce(%count, %x), channel_id=1, to_apply=%add
  ROOT %t = (s32[], f32[8,4]{1,0}) tuple(%count, %x)
}

%outer (c: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %c = (s32[], f32[8,4]{1,0}) parameter(0)
  %x = f32[8,4]{1,0} get-tuple-element(%c), index=1
  %half = bf16[8,4]{1,0} convert(%x)
  %all = bf16[16,4]{1,0} all-gather(%half), channel_id=2, dimensions={0}
  %w = (s32[], f32[8,4]{1,0}) while(%c), condition=%cond, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %v = (s32[], f32[8,4]{1,0}) while(%w), condition=%cond, body=%inner
}

%cond (c: (s32[], f32[8,4])) -> pred[] {
  %c = (s32[], f32[8,4]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = f32[8,4]{1,0} collective-permute(%p), channel_id=3, source_target_pairs={{0,1},{1,0}}
  %c = (s32[], f32[8,4]{1,0}) tuple(%zero, %start)
  %w = (s32[], f32[8,4]{1,0}) while(%c), condition=%cond, body=%outer
  ROOT %out = f32[8,4]{1,0} get-tuple-element(%w), index=1
}
"""


def test_bytes_are_counted_by_place_and_by_turns_of_loops():
    scaling = load("scaling")
    one_reduce = 4 + 8 * 4 * 4  # a scalar and an array of float32
    assert scaling.sent(HLO, most_turns=5) == [
        scaling.Sent("all-gather", True, 1, 8 * 4 * 2, 8 * 4 * 2),
        scaling.Sent("all-reduce", True, 3 + 5, (3 + 5) * one_reduce, one_reduce),
        scaling.Sent("collective-permute", False, 1, 8 * 4 * 4, 8 * 4 * 4),
    ]


def test_stagger(tmp_path):
    report = run("stagger", tmp_path)
    times = {row["optimizer"]: row for row in report["rows"] if row["table"] == "times"}
    assert set(times) == {"sgd", "RigL, dense", "RigL, dense, stagger"}
    assert all(0 < row["median_ms"] <= row["max_ms"] <= row["total_ms"] for row in times.values())
    digits = {row["quantity"]: row for row in report["rows"] if row["table"] == "digits"}
    assert 10 < digits["accuracy"]["at_once"] <= 100
    assert 3 < digits["explored"]["stagger"] < 100  # 3% are active at the start


def test_start_up(tmp_path):
    report = run("start_up", tmp_path)
    rows = {row["case"]: row for row in report["rows"]}
    assert set(rows) == {"adamw", "RigL, dense"}
    for row in rows.values():
        assert row["first_step"] > row["second_step"] > 0
        assert row["step_traced"] == 1
        assert row["topology_update_programs"] == row["step_after_programs"] == 0  # compiled once
    assert rows["RigL, dense"]["num_topology_updates"] == 1


def test_peers_needs_a_checkout(tmp_path):
    peers = load("peers")
    with pytest.raises(ValueError, match="give --jaxpruner DIR, --reference DIR or both"):
        peers.main(peers.Config(smoke=True))
    with pytest.raises(FileNotFoundError, match=r"--jaxpruner .* holds no jaxpruner/__init__.py"):
        peers.main(peers.Config(smoke=True, jaxpruner=tmp_path))
    with pytest.raises(FileNotFoundError, match=r"--reference .* holds no A-ITOP"):
        peers.main(peers.Config(smoke=True, reference=tmp_path))


def test_peers_says_what_python_lacks(tmp_path):
    peers = load("peers")
    module = tmp_path / "A-ITOP" / "sparselearning" / "train_helper.py"
    module.parent.mkdir(parents=True)
    module.touch()
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'torch'\" >&2\nexit 1\n")
    python.chmod(0o755)
    config = peers.Config(smoke=True, reference=tmp_path, reference_python=python)
    with pytest.raises(
        RuntimeError, match=r"give a Python that can import torch and numpy(?s:.*)No module named 'torch'"
    ):
        peers.main(config)


def test_a_former_tree_map_leaves_none_alone():
    trees = {"kernel": 1, "bias": None}, {"kernel": 2, "bias": 3}
    assert load("peers").former_tree_map(lambda a, b: a + b, *trees) == {"kernel": 3, "bias": None}


def test_networks_have_the_size_asked_for():
    networks = load("networks")
    for num_params, multiple_of in ((5_000, 1), (20_000, 8), (1_000_000, 8)):
        params = jax.eval_shape(lambda n=num_params, m=multiple_of: networks.mlp_params(n, multiple_of=m))
        kernels = [layer["kernel"].shape for layer in params.values()]
        assert num_params <= sum(m * n for m, n in kernels) < 1.4 * num_params
        assert all(m % multiple_of == 0 for m, _ in kernels)
