"""A transformer scanned over its layers and the same one unrolled: the same masks, and trained, the same numbers."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sparse_loop import train

import agent_optax

NUM_LAYERS, WIDTH, LENGTH, VOCABULARY = 4, 16, 6, 11


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        y = nn.LayerNorm(name="norm_1")(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(y)
        y = nn.LayerNorm(name="norm_2")(x)
        return x + nn.Dense(WIDTH, name="down")(nn.gelu(nn.Dense(32, name="up")(y))), None


class Transformer(nn.Module):
    """Of four blocks."""

    is_scanned: bool

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(VOCABULARY, WIDTH, name="embed")(tokens)
        if self.is_scanned:
            scan = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=NUM_LAYERS)
            x, _ = scan(name="blocks")(x, None)
        else:
            for i in range(NUM_LAYERS):
                x, _ = Block(name=f"block_{i}")(x)
        return nn.Dense(VOCABULARY, name="head")(x)


def unrolled(tree: Any) -> Any:
    """A tree like the parameters of the scanned model, as that of the other."""
    rest = {name: subtree for name, subtree in tree.items() if name != "blocks"}
    blocks = {
        f"block_{i}": jax.tree.map(lambda leaf, i=i: None if leaf is None else leaf[i], tree["blocks"])
        for i in range(NUM_LAYERS)
    }
    return {**rest, **blocks}


def tokens_of(step: jax.Array) -> jax.Array:
    return jax.random.randint(jax.random.key(step), (4, LENGTH), 0, VOCABULARY)


def trained(is_scanned: bool, params: Any, masks: Any, storage: str, pattern: Any) -> tuple[Any, Any]:
    model = Transformer(is_scanned)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, ::-1]).mean()

    topology = agent_optax.rigl(update_every=2, drop_fraction=0.3)
    tx = agent_optax.sparsify(optax.adam(1e-2), topology, masks=masks, storage=storage, pattern=pattern)
    params, opt_state, _ = train(tx, params, lambda p, step: jax.grad(loss)(p, tokens_of(step)), num_steps=6)
    return agent_optax.active_masks(opt_state, params), params


@pytest.mark.parametrize(("storage", "pattern"), [("dense", agent_optax.n_m(2, 4)), ("compact", None)])
def test_scanned_and_unrolled(storage: str, pattern: Any) -> None:
    params = Transformer(is_scanned=True).init(jax.random.key(0), tokens_of(jnp.asarray(0)))["params"]
    params["blocks"]["up"]["kernel"] *= jnp.asarray([1.0, 0.2, 3.0, 1.0])[:, None, None]
    sparsity = 0.8 if pattern is None or pattern.density is None else None
    masks = agent_optax.magnitude_masks(params, sparsity, scope="layer", pattern=pattern)
    own_masks = agent_optax.magnitude_masks(unrolled(params), sparsity, scope="layer", pattern=pattern)
    jax.tree.map(np.testing.assert_array_equal, own_masks, unrolled(masks))

    after, weights = trained(True, params, masks, storage, pattern)
    own_after, own_weights = trained(False, unrolled(params), own_masks, storage, pattern)
    jax.tree.map(np.testing.assert_array_equal, own_after, unrolled(after))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), own_weights, unrolled(weights))
    changed = sum(
        int(np.sum(old != new)) for old, new in zip(jax.tree.leaves(masks), jax.tree.leaves(after), strict=True)
    )
    assert changed > 100
    if pattern is not None and pattern.density is not None:
        for name in ("query", "key", "value", "out"):
            matrices = np.asarray(after["blocks"]["attention"][name]["kernel"]).reshape(NUM_LAYERS, 4, 4, WIDTH)
            assert np.all(matrices.sum(2) == 2), name
