"""The README keeps its word: its code runs, its names and files exist, its tables are the ones that are printed."""

import importlib
import re
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import agent_optax

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def after_all_blocks() -> dict:
    """The names that the Python blocks leave behind, run one after another as a reader would."""
    blocks = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 4
    namespace: dict = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    return namespace


@pytest.mark.examples
def test_sparse_training_learns_and_stays_sparse(after_all_blocks):
    params, opt_state, loss_fn = (after_all_blocks[name] for name in ("params", "opt_state", "loss_fn"))
    batches = after_all_blocks["batches"]
    losses = jax.vmap(loss_fn, in_axes=(None, 0))(params, batches)
    assert float(losses.mean()) < 0.5  # log(10) = 2.3 is chance
    report = agent_optax.diagnostics(opt_state)
    assert float(report["sparsity"]) == pytest.approx(0.9, abs=1e-3)
    assert int(report["num_topology_updates"]) > 0
    assert 0 < float(report["correlation"]) <= 1
    kernels = [layer["kernel"] for layer in params.values()]
    active = sum(int(np.count_nonzero(kernel)) for kernel in kernels)
    assert active <= round(0.1 * sum(kernel.size for kernel in kernels)) + 1


@pytest.mark.examples
def test_accumulation_corrects_each_micro_batch(after_all_blocks):
    """Two micro-batches, each corrected, then averaged, are one step with the mean of their corrected gradients."""
    tx, loss_fn, batches = (after_all_blocks[name] for name in ("accumulating", "loss_fn", "batches"))
    params = after_all_blocks["params"]
    state = agent_optax.refresh(loss_fn, jax.tree.map(lambda p: 0.9 * p, params), tx.init(params), batches)
    grads_fn, corrected = agent_optax.value_and_grads(loss_fn), []
    num_micro_batches = 4
    for i in range(num_micro_batches):
        batch = jax.tree.map(lambda x, i=i: x[i], batches)
        (_, grads), extras = grads_fn(params, state, batch)
        mean_grads = optax.tree_utils.tree_get(state, "mean_grads")
        weight = agent_optax.diagnostics(state)["correction_weight"]
        corrected.append(
            jax.tree.map(lambda g, old, mean, w=weight: g - w * (old - mean), grads, extras["old_grads"], mean_grads)
        )
        updates, state = tx.update(grads, state, params, **extras)
        is_last = i == num_micro_batches - 1
        assert all((np.asarray(u) != 0).any() == is_last for u in jax.tree.leaves(updates))
    mean = jax.tree.map(lambda *g: sum(g) / num_micro_batches, *corrected)
    for update, grad in zip(jax.tree.leaves(updates), jax.tree.leaves(mean), strict=True):
        np.testing.assert_allclose(update, -0.1 * grad, rtol=1e-3, atol=1e-6)


def box() -> dict[str, list[str]]:
    """What the table 'What is in the box' lists: module to names."""
    section = README.split("## What is in the box")[1].split("\n## ")[0]
    listed: dict[str, list[str]] = {}
    module = "agent_optax"
    for line in section.splitlines():
        if heading := re.match(r"\*\*`(agent_optax[\w.]*)`\*\*", line):
            module = heading[1]
        elif line.startswith("|"):
            listed.setdefault(module, []).extend(re.findall(r"`(\w+)`", line.split("|")[2]))
    return listed


@pytest.mark.parametrize("module", sorted(box()))
def test_box_lists_exactly_the_public_names(module):
    public = set(importlib.import_module(module).__all__)
    assert set(box()[module]) == public


def test_every_subpackage_with_public_names_is_in_the_box():
    packages = {f"agent_optax.{path.parent.name}" for path in (ROOT / "agent_optax").glob("*/__init__.py")}
    reexported = {"agent_optax.correction", "agent_optax.sparsity"}
    assert packages - reexported <= set(box())


def test_local_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", README)
    local = [link for link in links if "://" not in link]
    assert local
    assert [link for link in local if not (ROOT / link).exists()] == []


def test_plot_is_small():
    assert (ROOT / "docs/images/quickstart_fashion_mnist.png").stat().st_size < 200_000


def test_commands_name_real_flags():
    """Every --flag that the README passes to the quickstart is one that it takes."""
    source = (ROOT / "examples" / "quickstart.py").read_text(encoding="utf-8")
    flags = set(re.findall(r"--([a-z]+(?:-[a-z]+)*)", "\n".join(re.findall(r".*quickstart.*", README))))
    assert flags
    assert [flag for flag in flags if not re.search(rf"^    {flag.replace('-', '_')}: ", source, re.MULTILINE)] == []
