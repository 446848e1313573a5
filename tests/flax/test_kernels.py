"""Which leaves are pruned by default: the same ones of the same layers in NNX, in Linen, and in both with boxes."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import agent_optax
from agent_optax.sparsity._leaf_names import leaf_names

KERNEL, NOT = True, False


class NNXLayers(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, normalize_qk=True, rngs=rngs)
        self.conv = nnx.Conv(8, 6, (3,), rngs=rngs)
        self.batch_norm = nnx.BatchNorm(6, rngs=rngs)
        self.layer_norm = nnx.LayerNorm(6, rngs=rngs)
        self.heads = nnx.LinearGeneral(6, (2, 3), rngs=rngs)
        self.lora = nnx.LoRA(6, 2, 4, rngs=rngs)
        self.dense = nnx.Linear(6, 4, rngs=rngs)


class LinenLayers(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(11, 8, name="embed")(tokens)
        x = nn.MultiHeadDotProductAttention(2, normalize_qk=True, name="attention")(x)
        x = nn.Conv(6, (3,), name="conv")(x)
        x = nn.BatchNorm(use_running_average=False, name="batch_norm")(x)
        x = nn.LayerNorm(name="layer_norm")(x)
        nn.DenseGeneral((2, 3), name="heads")(x)
        self.param("lora_a", nn.initializers.normal(), (6, 2))
        self.param("lora_b", nn.initializers.zeros, (2, 4))
        return nn.Dense(4, name="dense")(x)


PRUNED = {f"attention/{part}/kernel" for part in ("query", "key", "value", "out")} | {
    "conv/kernel",
    "heads/kernel",
    "dense/kernel",
}


def nnx_params() -> Any:
    return nnx.state(NNXLayers(nnx.Rngs(0)), nnx.Param)


def linen_params() -> Any:
    return LinenLayers().init(jax.random.key(0), jnp.zeros((1, 5), int))["params"]


@pytest.mark.parametrize("make", [nnx_params, lambda: nnx.to_pure_dict(nnx_params()), linen_params])
def test_kernels(make: Any) -> None:
    params = make()
    names, chosen = leaf_names(params), jax.tree.leaves(agent_optax.kernels(params))
    assert {name for name, is_pruned in zip(names, chosen, strict=True) if is_pruned} == PRUNED
    shapes = {name: leaf.shape for name, leaf in zip(names, jax.tree.leaves(params), strict=True)}
    assert shapes["attention/query/bias"] == (2, 4)  # two axes, and still a bias
    assert {"embed/embedding", "conv/bias", "batch_norm/scale", "attention/query_ln/scale"} <= set(names)
    assert sum("lora_" in name for name in names) == 2


def test_boxes_of_linen_do_not_hide_the_name() -> None:
    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            kernel = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
            bias = nn.with_partitioning(nn.initializers.zeros, ("heads", "out"))
            return x @ self.param("kernel", kernel, (4, 3)) + self.param("bias", bias, (2, 3)).sum(0)

    params = Boxed().init(jax.random.key(0), jnp.ones((1, 4)))["params"]
    assert jax.tree.leaves(agent_optax.kernels(params)) == [NOT, KERNEL]
    assert leaf_names(params) == ["bias", "kernel"]


@pytest.mark.parametrize("name", ["positions", "pos_embed", "pe"])
@pytest.mark.parametrize("framework", ["nnx", "linen", "plain"])
def test_positions_of_context_and_width_are_not_pruned_unasked(framework: str, name: str) -> None:
    context, width = 6, 8

    class NNXModel(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            setattr(self, name, nnx.Param(jnp.ones((context, width))))
            self.dense = nnx.Linear(width, width, rngs=rngs)

    class LinenModel(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(width, name="dense")(x + self.param(name, nn.initializers.normal(), (context, width)))

    params = {
        "nnx": lambda: nnx.state(NNXModel(nnx.Rngs(0)), nnx.Param),
        "linen": lambda: LinenModel().init(jax.random.key(0), jnp.ones((context, width)))["params"],
        "plain": lambda: {name: jnp.ones((context, width)), "dense": {"kernel": jnp.ones((width, width))}},
    }[framework]()
    chosen = dict(zip(leaf_names(params), jax.tree.leaves(agent_optax.kernels(params)), strict=True))
    assert not chosen[name] and chosen["dense/kernel"]
    asked = dict(zip(leaf_names(params), jax.tree.leaves(agent_optax.named(name)(params)), strict=True))
    assert asked[name] and not asked["dense/kernel"]


@pytest.mark.parametrize("make", [nnx_params, linen_params])
def test_named_chooses_what_kernels_leave_out(make: Any) -> None:
    params = make()
    chosen = agent_optax.named("*/embedding", "*lora_[ab]")(params)
    pruned = {n for n, c in zip(leaf_names(params), jax.tree.leaves(chosen), strict=True) if c}
    assert {name.rsplit("/", 1)[-1] for name in pruned} == {"embedding", "lora_a", "lora_b"} and len(pruned) == 3
    tx = agent_optax.sparsify(optax.sgd(0.1), agent_optax.static(), sparsity=0.75, where=agent_optax.named("embed*"))
    assert float(agent_optax.diagnostics(tx.init(params))["sparsity"]) == 0.75


def test_sparsity_by_name_sees_the_same_names() -> None:
    asked = []

    def sparsity(name: str) -> float:
        asked.append(name)
        return 0.5

    for params in (nnx_params(), linen_params()):
        asked.clear()
        tx = agent_optax.sparsify(optax.sgd(0.1), agent_optax.static(), sparsity=sparsity)
        jax.eval_shape(tx.init, params)
        assert set(asked) == PRUNED


@pytest.mark.parametrize(
    ("make", "error", "parts"),
    [
        (lambda: agent_optax.named(), ValueError, ("named('*/kernel', '*/embedding')",)),
        (lambda: agent_optax.named(3), TypeError, ("got 3", "'*/kernel'")),
        (lambda: agent_optax.named("kernl")(linen_params()), ValueError, ("'kernl' fits none", "dense/kernel")),
        (
            lambda: agent_optax.sparsify(optax.sgd(0.1), agent_optax.static(), sparsity=0.5).init(
                nnx.state(nnx.Embed(5, 4, rngs=nnx.Rngs(0)), nnx.Param)
            ),
            ValueError,
            ("the leaves are embedding", "agent_optax.named('*/embedding')"),
        ),
    ],
)
def test_message(make: Any, error: type[Exception], parts: tuple[str, ...]) -> None:
    with pytest.raises(error) as raised:
        make()
    assert [part for part in parts if part not in str(raised.value)] == [], str(raised.value)
