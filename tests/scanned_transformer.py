"""A small transformer, scanned over its layers or unrolled, and how it is trained."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
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


def initial_params() -> Any:
    """Of the scanned model; the weights of layers are of different size."""
    params = Transformer(is_scanned=True).init(jax.random.key(0), tokens_of(jnp.asarray(0)))["params"]
    params["blocks"]["up"]["kernel"] *= jnp.asarray([1.0, 0.2, 3.0, 1.0])[:, None, None]
    return params


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
