"""The summary against the masks themselves, for both storages, and its table."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import agent_optax
from agent_optax import analysis

PARAMS = {
    "first": {"bias": jnp.ones(24), "kernel": jax.random.normal(jax.random.key(0), (10, 24))},
    "last": {"bias": jnp.ones(4), "kernel": jax.random.normal(jax.random.key(1), (24, 4))},
}
X = jax.random.normal(jax.random.key(2), (5, 10))


def apply_fn(params, x):
    x = jax.nn.relu(x @ params["first"]["kernel"] + params["first"]["bias"])
    return x @ params["last"]["kernel"] + params["last"]["bias"]


def run(topology, storage: str, num_steps: int = 9):
    """Parameters, state and the union of all masks so far."""
    tx = agent_optax.sparsify(optax.sgd(0.1), topology, sparsity=0.8, storage=storage, key=1)
    opt_state = tx.init(PARAMS)
    params = agent_optax.mask_params(PARAMS, opt_state)

    @jax.jit
    def step(params, opt_state):
        grads = jax.grad(lambda params: jnp.mean(apply_fn(params, X) ** 2))(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return params, opt_state, agent_optax.active_masks(opt_state, params)

    ever = {k: np.asarray(m["kernel"]) for k, m in agent_optax.active_masks(opt_state, params).items()}
    for _ in range(num_steps):
        params, opt_state, masks = step(params, opt_state)
        ever = {k: m | np.asarray(masks[k]["kernel"]) for k, m in ever.items()}
    return params, opt_state, ever


@pytest.mark.parametrize("storage", ["dense", "compact"])
@pytest.mark.parametrize("topology", ["set_", "rigl", "static"])
def test_density_and_exploration_are_those_of_the_masks(storage, topology):
    making = agent_optax.static() if topology == "static" else getattr(agent_optax, topology)(update_every=2)
    params, opt_state, ever = run(making, storage)
    summary = analysis.sparsity_summary(params, opt_state)
    layers = {layer.name: layer for layer in summary.layers}
    assert list(layers) == ["first/bias", "first/kernel", "last/bias", "last/kernel"]
    masks = agent_optax.active_masks(opt_state, params)
    for name in ("first", "last"):
        layer, mask = layers[f"{name}/kernel"], masks[name]["kernel"]
        assert layer.shape == mask.shape and layer.num_weights == mask.size
        assert layer.num_active == int(mask.sum()) and layer.density() == float(mask.sum()) / mask.size
        assert layer.num_ever_active == int(ever[name].sum())
        assert layer.explored() == ever[name].sum() / mask.size
        bias = layers[f"{name}/bias"]
        assert bias.density() == 1 and bias.explored() is None and bias.flops is None
    if topology != "static":
        assert summary.pruned.num_ever_active > summary.pruned.num_active
    report = agent_optax.diagnostics(opt_state)
    assert 1 - summary.pruned.density() == pytest.approx(float(report["sparsity"]), abs=1e-6)
    assert summary.pruned.explored() == pytest.approx(float(report["exploration_rate"]), abs=1e-6)
    assert summary.total.num_weights == sum(p.size for p in jax.tree.leaves(PARAMS))
    assert summary.total.num_active == summary.pruned.num_active + 28
    assert summary.total.explored() is None and summary.other_flops is None


def test_storages_agree():
    """SET does not look at gradients of inactive weights, so both take the same path."""
    texts = [
        str(
            analysis.sparsity_summary(
                *run(agent_optax.set_(update_every=2), storage)[:2], apply_fn=apply_fn, example_inputs=[X]
            )
        )
        for storage in ("dense", "compact")
    ]
    assert texts[0] == texts[1]


def test_flops_follow_the_density():
    params, opt_state, _ = run(agent_optax.static(), "dense", num_steps=1)
    summary = analysis.sparsity_summary(params, opt_state, apply_fn=apply_fn, example_inputs=[X[:1]])
    first, last = summary.layers[1], summary.layers[3]
    assert (first.flops, last.flops) == (2 * 10 * 24, 2 * 24 * 4)
    assert (first.sparse_flops, last.sparse_flops) == (2 * first.num_active, 2 * last.num_active)
    assert summary.total.flops == summary.pruned.flops == first.flops + last.flops
    assert summary.total.sparse_flops == 2 * summary.pruned.num_active
    assert summary.other_flops == 0


def test_given_masks_and_none():
    mask = jnp.zeros((10, 24), bool).at[0].set(True)
    masks = {"first": {"bias": None, "kernel": mask}, "last": {"bias": None, "kernel": None}}
    summary = analysis.sparsity_summary(PARAMS, masks=masks)
    assert summary.layers[1].density() == 0.1 and summary.layers[1].explored() is None
    assert summary.pruned.num_weights == 240 and summary.pruned.num_ever_active is None
    dense = analysis.sparsity_summary(PARAMS, apply_fn=apply_fn, example_inputs=[X])
    assert dense.pruned is None and dense.total.density() == 1
    assert dense.total.flops == dense.total.sparse_flops
    assert "pruned" not in str(dense)


def test_two_sparse_optimizers_in_one_state():
    def half(sparsity):
        return agent_optax.sparsify(optax.sgd(0.1), agent_optax.rigl(), sparsity=sparsity)

    labels = {"first": "first", "last": "last"}
    tx = optax.partition({"first": half(0.9), "last": half(0.5)}, labels)
    summary = analysis.sparsity_summary(PARAMS, tx.init(PARAMS))
    assert [layer.density() for layer in summary.layers] == [1, 0.1, 1, 0.5]
    assert [layer.explored() for layer in summary.layers] == [None, 0.1, None, 0.5]


class LinenNetwork(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


class NnxNetwork(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), strides=2, rngs=rngs)
        self.dense = nnx.Linear(8 * 8 * 8, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.conv(x))
        return self.dense(x.reshape(len(x), -1))


CONV, DENSE = 2 * 8 * 8 * 27 * 8, 2 * 512 * 10


@pytest.mark.parametrize("storage", ["dense", "compact"])
@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_flax_models(library, storage):
    image = jnp.ones((1, 16, 16, 3))
    if library == "linen":
        model = LinenNetwork()
        params = model.init(jax.random.key(0), image)["params"]
        apply = lambda params, x: model.apply({"params": params}, x)  # noqa: E731
    else:
        graphdef, params = nnx.split(NnxNetwork(nnx.Rngs(0)), nnx.Param)
        apply = lambda params, x: nnx.merge(graphdef, params)(x)  # noqa: E731
    tx = agent_optax.sparsify(
        optax.sgd(0.1), agent_optax.rigl(), sparsity=0.75, distribution=agent_optax.uniform, storage=storage
    )
    summary = analysis.sparsity_summary(params, tx.init(params), apply_fn=apply, example_inputs=[image])
    kernels = [layer for layer in summary.layers if "kernel" in layer.name]
    assert [layer.flops for layer in kernels] == [CONV, DENSE]
    assert [layer.density() for layer in kernels] == [0.25, 0.25]
    assert summary.total.sparse_flops == (CONV + DENSE) // 4
    assert re.search(
        r"^(Conv_0/kernel|conv/kernel\S*) +3x3x3x8 +216 +54 +0.2500 +0.2500 +27.65k +6.912k$", str(summary), re.M
    )


def test_the_table_is_aligned():
    params, opt_state, _ = run(agent_optax.rigl(update_every=2), "dense")

    def attending(params, x):
        return apply_fn(params, x @ x.T @ x)

    text = str(analysis.sparsity_summary(params, opt_state, apply_fn=attending, example_inputs=[X]))
    lines = text.splitlines()
    header, rule = lines[:2]
    assert set(rule) == {"-"} and lines[6] == rule and len(lines) == 10
    assert max(map(len, lines)) == len(rule)
    ends = [match.end() for match in re.finditer(r"\S+(?: \S+)*", header)]
    for line in (*lines[2:6], *lines[7:]):
        assert len(line) == len(rule)
        assert all(end <= len(line) and line[end : end + 1] in ("", " ") for end in ends[2:])  # numbers to the right
    assert re.fullmatch(r"other products +1k +1k", lines[8])  # 2 * 5 * 5 * 10, twice
    assert re.search(r"first/kernel +10x24 +240", text)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1k"), (38_400, "38.4k"), (999_960, "1M"), (4_089_184_256, "4.089G")],
)
def test_numbers_have_four_digits(number, text):
    from agent_optax.analysis._sparsity_summary import _si

    assert _si(number) == text
