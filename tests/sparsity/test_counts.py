"""How many weights of which leaves are active: floors, targets, counts beyond 2^31, what is pruned by default."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import agent_optax
from agent_optax.sparsity._state import large_total

both_storages = pytest.mark.parametrize("storage", ["dense", "compact"])


def normal(*shapes: tuple[int, ...]) -> dict[str, jax.Array]:
    return {f"layer_{i}": jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)}


def counts(masks: Any) -> list[int]:
    return [int(np.sum(mask)) for mask in jax.tree.leaves(masks)]


def start_counts(params: Any, storage: str = "dense", **options: Any) -> list[int]:
    tx = agent_optax.sparsify(optax.sgd(0.1), agent_optax.rigl(update_every=1), storage=storage, **options)
    return counts(agent_optax.active_masks(tx.init(params), params))


@both_storages
def test_no_leaf_starts_without_a_weight_and_the_total_stays(storage: str) -> None:
    params = normal((64, 32), (4, 10), (3, 5))
    options = {"storage": storage, "distribution": agent_optax.uniform, "sparsity": 0.99}
    total = sum(round(0.01 * p.size) for p in params.values())
    with pytest.warns(UserWarning, match=r"no active weight.*layer_1 gets 1, layer_2 gets 1.*allow_empty_layers=True"):
        assert start_counts(params, **options) == [total - 2, 1, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert start_counts(params, **options, allow_empty_layers=True) == [total, 0, 0]


def test_a_sparsity_for_each_leaf_is_not_taken_from_others() -> None:
    with pytest.warns(UserWarning, match="layer_1 gets 1"):
        assert start_counts(normal((64, 4), (4, 10)), sparsity=lambda name: 0.99) == [3, 1]


def test_a_pattern_that_fixes_its_density_gives_nothing() -> None:
    params = normal((64, 64), (40, 40), (4, 5))
    patterns = lambda name: agent_optax.n_m(2, 4) if name == "layer_0" else None  # noqa: E731
    with pytest.warns(UserWarning, match="layer_2 gets 1"):
        sparse = start_counts(params, sparsity=0.99, distribution=agent_optax.uniform, pattern=patterns)
    assert sparse == [2048, 15, 1]


def test_floors_are_in_whole_blocks() -> None:
    params = normal((64, 64), (4, 8))
    with pytest.warns(UserWarning, match="layer_1 gets 4"):
        sparse = start_counts(
            params, sparsity=0.98, distribution=agent_optax.uniform, pattern=agent_optax.blocks((2, 2))
        )
    assert sparse == [round(0.02 * 1024) * 4 - 4, 4]


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_magnitude_masks_leave_each_leaf_a_weight(scope: str) -> None:
    params = normal((40, 40), (5, 4), (6, 5))
    params["layer_1"] *= 1e-3
    options = {"sparsity": 0.99, "scope": scope, "distribution": agent_optax.uniform}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept = counts(agent_optax.magnitude_masks(params, **options))
        free = counts(agent_optax.magnitude_masks(params, **options, allow_empty_layers=True))
    assert min(kept) == 1
    assert sum(kept) == sum(free)
    assert free[1] == 0
    best = np.argmax(np.abs(params["layer_1"]))
    mask = agent_optax.magnitude_masks(params, **{**options, "scope": "global"})["layer_1"]
    assert np.flatnonzero(mask).tolist() == [best]


@pytest.mark.parametrize("name", ["global pruning", "redistribution"])
def test_no_topology_takes_the_last_weight_of_a_layer(name: str) -> None:
    topology = {
        "global pruning": agent_optax.gradual_pruning(stop=6, update_every=2, scope="global"),
        "redistribution": agent_optax.snfs(update_every=1, drop_fraction=0.9),
    }[name]
    params = normal((30, 30), (6, 5), (5, 5))
    params["layer_1"] *= 1e-4
    tx = agent_optax.sparsify(optax.sgd(0.0), topology, sparsity=0.95, distribution=agent_optax.uniform)
    opt_state = tx.init(params)
    params = agent_optax.mask_params(params, opt_state)
    update = jax.jit(tx.update)
    for step in range(8):
        grads = jax.tree.map(lambda p, step=step: jax.random.normal(jax.random.key(step), p.shape), params)
        grads["layer_1"] *= 1e-6
        updates, opt_state = update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        assert min(counts(agent_optax.active_masks(opt_state, params))) >= 1


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_pruning_cannot_start_sparser_than_it_ends(scope: str) -> None:
    params = normal((40, 40))
    masks = {"layer_0": agent_optax.top_k_mask(jnp.abs(params["layer_0"]), 80)}
    topology = agent_optax.gradual_pruning(stop=4, update_every=1, scope=scope)
    sparser = agent_optax.sparsify(optax.sgd(0.1), topology, masks=masks, sparsity=0.5)
    with pytest.raises(ValueError, match=r"starts with 80 active weights in .*fewer than the 800"):
        sparser.init(params)
    agent_optax.sparsify(optax.sgd(0.1), topology, masks=masks, sparsity=0.95).init(params)


def test_patterns_that_fix_the_sparsity_leaf_by_leaf_need_no_other() -> None:
    params = normal((8, 4), (8, 6))
    assert start_counts(params, pattern=lambda name: agent_optax.n_m(2 if name == "layer_0" else 1, 4)) == [16, 12]
    some = lambda name: agent_optax.n_m(2, 4) if name == "layer_0" else None  # noqa: E731
    with pytest.raises(ValueError, match=r"needs sparsity=.*layer_1"):
        start_counts(params, pattern=some)


@pytest.mark.parametrize("make", [agent_optax.rigl, agent_optax.set_])
def test_accumulation_goes_outside(make: Any) -> None:
    params = normal((20, 20))
    mask = agent_optax.top_k_mask(jax.random.uniform(jax.random.key(9), (20, 20)), 80)
    inside = agent_optax.sparsify(optax.chain(optax.MultiSteps(optax.sgd(0.1), 4)), make(), masks={"layer_0": mask})
    with pytest.raises(ValueError, match=r"grow by the gradient of the last one: put it outside, optax\.MultiSteps"):
        inside.init(params)
    agent_optax.sparsify(optax.MultiSteps(optax.sgd(0.1), 4), agent_optax.static(), sparsity=0.5).init(params)


def test_growth_outside_is_by_the_mean_gradient() -> None:
    """The order that the error names, against sorting."""
    weights, rng = np.asarray(normal((20, 20))["layer_0"]), np.random.default_rng(0)
    mask = np.asarray(agent_optax.top_k_mask(jax.random.uniform(jax.random.key(9), (20, 20)), 80))
    micro = rng.normal(size=(4, 20, 20)).astype(np.float32)
    tx = optax.MultiSteps(agent_optax.sparsify(optax.sgd(0.1), agent_optax.rigl(1), masks=mask), 4)
    params = jnp.where(mask, weights, 0)
    opt_state = tx.init(params)
    for gradient in micro:
        updates, opt_state = tx.update(jnp.asarray(gradient), opt_state, params)
        params = optax.apply_updates(params, updates)
    mean = micro.mean(axis=0)
    expected = mask.copy().ravel()
    expected[np.argsort(np.where(mask, np.abs(weights - 0.1 * mean), np.inf).ravel(), kind="stable")[:24]] = False
    expected[np.argsort(-np.where(expected, -1, np.abs(mean).ravel()), kind="stable")[:24]] = True
    np.testing.assert_array_equal(agent_optax.active_masks(opt_state, params).ravel(), expected)


def test_totals_beyond_2_31_are_right() -> None:
    few = [jnp.asarray(n, jnp.int32) for n in (2**31 - 1, 2**31 - 1, 2**31 - 1, 5, 70_000)]
    assert float(large_total(few)) == np.float32(3 * (2**31 - 1) + 70_005)
    assert float(large_total([])) == 0


def shapes_of(number: int, *shape: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {f"layer_{i}": jax.ShapeDtypeStruct(shape, jnp.bfloat16) for i in range(number)}


def test_what_int32_cannot_count_is_refused() -> None:
    sgd = optax.sgd(0.1)
    one_leaf = shapes_of(1, 80, 8192, 28672)
    with pytest.raises(ValueError, match=r"layer_0 has 18790481920 weights.*several leaves"):
        jax.eval_shape(agent_optax.sparsify(sgd, agent_optax.rigl(), sparsity=0.5).init, one_leaf)
    with pytest.raises(ValueError, match="layer_0 has 18790481920 weights"):
        jax.eval_shape(lambda params: agent_optax.magnitude_masks(params, 0.5, scope="layer"), one_leaf)
    in_all = shapes_of(60, 4096, 11008)
    for topology in (agent_optax.snfs(), agent_optax.bayesian_rewiring(0.1, 10)):
        with pytest.raises(ValueError, match=r"2705326080 weights in all.*rigl\(\)"):
            jax.eval_shape(agent_optax.sparsify(sgd, topology, sparsity=0.5).init, in_all)
    with pytest.raises(ValueError, match=r"2705326080 weights in all.*scope='layer'"):
        jax.eval_shape(lambda params: agent_optax.magnitude_masks(params, 0.5), in_all)
    jax.eval_shape(agent_optax.sparsify(sgd, agent_optax.rigl(), sparsity=0.5).init, in_all)


# Paths of leaves in Flax's examples, Hugging Face's Flax models, Haiku, Equinox and big_vision, and
# in plain trees, with their shapes.
KERNELS = {
    "Dense_0/kernel": (4, 4),
    "encoder/layer_0/attention/query/kernel": (16, 2, 8),
    "linear/w": (4, 4),
    "mlp/layers/0/weight": (4, 4),
    "embedding/kernel": (16, 16, 3, 8),  # the patches of a vision transformer
    "patch_embed/proj/kernel": (16, 16, 3, 8),
    "lstm_cell/hi/kernel": (8, 8),
    "norm_free_block/conv/kernel": (3, 3, 4, 4),
    "attn/weight": (12, 8, 8),
    "pos_conv_embed/conv/kernel": (5, 4, 4),
    "positions_mlp/kernel": (4, 4),
    "proj/weight": (4, 4),
}
NO_KERNELS = {
    "cls": (1, 1, 16),
    "Transformer/posembed_input/pos_embedding": (1, 9, 16),
    "embeddings/cls_token": (1, 1, 8),
    "embeddings/position_embeddings": (1, 5, 8),
    "embeddings/mask_token": (1, 1, 8),
    "embed/embeddings": (10, 4),
    "token_embedder/embedding": (10, 4),
    "wte/weight": (10, 4),
    "embedding/weight": (10, 4),
    **dict.fromkeys(("pos", "positions", "position", "pos_emb", "pos_embed", "positional_encoding"), (64, 32)),
    **dict.fromkeys(("pos_encoding", "pe", "learned_positions", "wpe", "wte", "token_embed", "tok_emb"), (64, 32)),
    "positions/weight": (64, 32),
    "rel_pos_bias": (12, 32),
    "relative_position_bias_table": (12, 32),
    "relative_attention_bias/embedding": (12, 32),
    "decoder/embedding_table": (12, 32),
    "class_embedding": (1, 32),
    "norm/weight": (12, 8),
    "layers/LayerNorm_0/scale": (12, 8),
    "layers/attention_norm/kernel": (12, 8),
    "ln_1/weight": (12, 8),
    "layer_scale/gamma": (12, 8),
    "attn/b": (12, 8),
    "attn/query/bias": (2, 8),
    "MAPHead_0/probe": (1, 1, 16),
    "relpos_bias/rel_embedding": (12, 32),
    "dense/kernel/lora_a": (8, 2),
}


def nested(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, shape in shapes.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = jnp.ones(shape)
    return tree


@pytest.mark.parametrize(("path", "is_kernel"), [*((p, True) for p in KERNELS), *((p, False) for p in NO_KERNELS)])
def test_what_is_pruned_by_default(path: str, is_kernel: bool) -> None:
    chosen = agent_optax.kernels(nested({path: {**KERNELS, **NO_KERNELS}[path]}))
    assert jax.tree.leaves(chosen) == [is_kernel]
