"""Which leaves are pruned, and how densely."""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from agent_optax.sparsity._leaf_names import leaf_names
from agent_optax.sparsity._matching import matched_leaves

MAX_COUNT = 2**31 - 1  # of an int32

# Names of leaves in Flax, Hugging Face's Flax models, Haiku, Equinox, big_vision and models written by hand that are no
# kernels, though they may have two axes or more in attention and in stacked layers: biases and scales, tokens that are
# added to activations, factors that are small already, and the values of sparse layers.
NEVER_PRUNED = frozenset(
    "b beta bias biases offset gain gamma layer_scale scale scales embedding_table relative_attention_bias cls "
    "cls_token class_token dist_token mask_token probe query_tokens register_tokens lora_a lora_b values".split()
)
# Tables whose rows are looked up and not multiplied, or added to activations: leaves of these names, and the ``weight``
# or ``w`` of layers of these names.
TABLE = re.compile(r"(.*_)?(embed|embedding|embeddings|embedder|emb|wte|wpe)(_?\d+)?")
POSITION = re.compile(
    r"pe|(.*_)?(pos|position|positions|positional)_?(emb|embed|embedding|embeddings|enc|encoding|encodings|table|bias)?"
    r"(_table)?(_?\d+)?"
)
# Components of a path below which nothing is a kernel, whatever its name: layers of normalization.
NORMALIZATION = re.compile(
    r"(layer|batch|group|instance|rms)?_?norm(alization)?(_?\d+)?|.*_(layer)?norm(_?\d+)?|ln(_?\w)?|bn(_?\d+)?"
)


def kernels(params: optax.Params) -> Any:
    """The default choice of leaves to prune: matrices and filters, whatever the framework.

    These are the kernels of dense, convolutional, attention and recurrent layers: leaves of two or more axes, except
    those that by their names, as Flax, Hugging Face, Haiku, Equinox and big_vision give them, are something else:

    - biases, scales and all of a normalization layer, which have two axes in attention and in stacked layers;
    - tables of embeddings, of which each batch looks up few rows: ``embedding``, ``wte`` and the like, or the
      ``weight`` or ``w`` of a layer of such a name;
    - tokens and positions, which are added and not multiplied: ``cls``, ``mask_token``, ``pos_embedding``,
      ``positions``;
    - factors of LoRA, which are small already, and the ``values`` of sparse layers, all of which exist.

    `named` chooses those, or anything else.

    Args:
        params: a tree of arrays.

    Returns:
        A tree like `params` of bools, True for each leaf to prune.

    Example:
        >>> import agent_optax, jax.numpy as jnp
        >>> agent_optax.kernels({"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)})
        {'bias': False, 'kernel': True}
    """
    leaves, treedef = jax.tree.flatten(params)
    names = leaf_names(params)
    return treedef.unflatten(
        [
            jnp.ndim(leaf) >= 2 and not _is_no_kernel(name.lower().split("/"))
            for name, leaf in zip(names, leaves, strict=True)
        ]
    )


def _is_no_kernel(path: list[str]) -> bool:
    """By the names on the path of a leaf, in lower case."""
    *layers, name = path
    of_table = layers[-1] if layers and name in ("w", "weight") else name
    is_table = TABLE.fullmatch(of_table) is not None or POSITION.fullmatch(of_table) is not None
    return name in NEVER_PRUNED or is_table or any(NORMALIZATION.fullmatch(layer) for layer in layers)


def named(*patterns: str) -> Callable[[optax.Params], Any]:
    """A choice of leaves to prune by name, for ``sparsify(..., where=)``.

    Args:
        patterns: shell patterns for the whole path of a leaf, such as ``"Dense_0/kernel"``, ``"*/embedding"`` or
            ``"*lora_[ab]"``; a leaf is chosen when one of them fits. ``*`` stands for anything, slashes included.

    Returns:
        A function of params that returns a tree like them, of bools.

    Raises:
        ValueError: if there is no pattern; from the function, if a pattern fits no leaf.
        TypeError: if a pattern is no string.

    Example:
        >>> import agent_optax, jax.numpy as jnp, optax
        >>> params = {"Embed_0": {"embedding": jnp.ones((9, 4))}, "Dense_0": {"kernel": jnp.ones((4, 3))}}
        >>> where = agent_optax.named("*/kernel", "*/embedding")
        >>> where(params)
        {'Dense_0': {'kernel': True}, 'Embed_0': {'embedding': True}}
        >>> tx = agent_optax.sparsify(optax.sgd(0.1), agent_optax.set_(), sparsity=0.5, where=where)
    """
    if not patterns:
        raise ValueError("named needs the names of leaves, such as named('*/kernel', '*/embedding').")
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"named takes names or shell patterns such as '*/kernel', got {pattern!r}.")

    def where(params: optax.Params) -> Any:
        names = leaf_names(params)
        for pattern in patterns:
            if names and not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"named: {pattern!r} fits none of the leaves {', '.join(names)}.")
        chosen = [any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns) for name in names]
        return jax.tree.structure(params).unflatten(chosen)

    return where


def is_function(choice: Any) -> bool:
    """Tells a function from a tree whose class can be called, as a module of Equinox can."""
    is_leaf = jax.tree_util.treedef_is_leaf(jax.tree.structure(choice))
    return callable(choice) and (is_leaf or isinstance(choice, functools.partial))


def prunable(params: optax.Params, where: Callable[[optax.Params], Any] | Any) -> Any:
    """A tree like `params` of bools; `where` is a function or a tree, or a prefix of one, as in `optax.masked`.

    A leaf without entries is never pruned.
    """
    leaves, treedef = jax.tree.flatten(params)
    bools = matched_leaves(where(params) if is_function(where) else where, params, "where=", is_prefix=True)
    chosen = treedef.unflatten([bool(c) and jnp.size(leaf) > 0 for c, leaf in zip(bools, leaves, strict=True)])
    if jax.tree.leaves(params) and not any(jax.tree.leaves(chosen)):
        raise ValueError(
            "where= selects no leaf to prune. The default, agent_optax.kernels, takes leaves of two or more axes, but "
            f"neither embeddings nor LoRA's factors; the leaves are {', '.join(leaf_names(params))}. Choose among them "
            "with where=agent_optax.named('*/embedding'), say, or pass "
            "where=lambda params: jax.tree.map(lambda p: True, params) to prune every leaf."
        )
    named = zip(leaf_names(params), jax.tree.leaves(params), jax.tree.leaves(chosen), strict=True)
    for name, leaf, is_chosen in named:
        if is_chosen and not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"where= selects the leaf {name} of dtype {jnp.result_type(leaf)}: only floating-point leaves can be "
                "pruned."
            )
    return chosen


def check_sizes(sizes: dict[str, int], counts_jointly: bool) -> None:
    """Raises ValueError where weights would be counted wrong: their numbers and positions are int32."""
    for name, size in sizes.items():
        if size > MAX_COUNT:
            raise ValueError(
                f"{name} has {size} weights, and positions and counts within a leaf end at 2^31 - 1: keep it as "
                "several leaves, one for each layer or expert, say."
            )
    if counts_jointly and sum(sizes.values()) > MAX_COUNT:
        raise ValueError(
            f"the pruned leaves have {sum(sizes.values())} weights in all, and those that are selected from all layers "
            "together are counted up to 2^31 - 1: select layer by layer (scope='layer', or a topology that keeps the "
            "number of active weights of each layer, such as agent_optax.rigl()), or prune fewer leaves with where=."
        )
