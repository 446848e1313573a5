"""Wanda: weights and the activations that they multiply."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from agent_optax._tree import wide_dtype
from agent_optax.sparsity._axes import Axes
from agent_optax.sparsity._default_axes import AxesChoice, axes_of_leaves, check_axes
from agent_optax.sparsity._leaf_names import leaf_names
from agent_optax.sparsity._matching import matched_leaves
from agent_optax.sparsity.pruning._score_masks import NetworkScore


def wanda(inputs: Any, axes: AxesChoice = None) -> NetworkScore:
    r"""Wanda, for `score_masks`: the magnitude of a weight times the norm of what it multiplies.

    .. math::
        s_{ij} = |W_{ij}| \cdot \lVert X_i \rVert_2

    where :math:`X_i` are all values of input i, over samples, tokens and positions. The paper prunes a trained network
    once and compares within each output, which is pattern `fan_in`, or 2:4:
    ``score_masks(wanda(inputs), params, 0.5, scope="layer", distribution=uniform, pattern=fan_in())``.

    Args:
        inputs: a tree like params, in which each leaf to prune has the activations that it multiplies, and others None
            or nothing: ``[*stack, ..., *inputs]`` with the sizes of the leaf's axes of these roles (see `Axes`): for a
            dense kernel ``[..., n_in]``, for a convolution ``[batch, height, width, channels]``, for the output
            projection of attention ``[..., heads, head_dim]``, for layers stacked by a scan ``[layers, ..., n_in]``.
            Norms instead of activations, ``[*stack, *inputs]``, do as well: what a pass over many batches adds up.
        axes: what the axes of leaves are: as passed to `score_masks`. Default None: by the conventions of Flax.

    Returns:
        A score for `score_masks`.

    Raises:
        ValueError: from `score_masks`, if activations do not fit their leaf.

    Example:
        >>> import agent_optax, jax.numpy as jnp
        >>> params = {"kernel": jnp.array([[1.0, -4.0], [2.0, 1.0], [3.0, 2.0], [0.5, 3.0]])}
        >>> score = agent_optax.wanda({"kernel": jnp.array([[9.0, 0.1, 1.0, 1.0], [9.0, 0.1, 1.0, 1.0]])})
        >>> masks = agent_optax.score_masks(
        ...     score, params, 0.5, scope="layer", distribution=agent_optax.uniform, pattern=agent_optax.fan_in()
        ... )
        >>> masks["kernel"].tolist()
        [[True, True], [False, False], [True, False], [False, True]]

    References:
        Sun et al., A Simple and Effective Pruning Approach for Large Language Models, ICLR 2024, equation 1.
    """
    check_axes(axes)

    def score(params: optax.Params) -> Any:
        leaves, treedef = jax.tree.flatten(params)
        names, shapes = leaf_names(params), [jnp.shape(leaf) for leaf in leaves]
        found = matched_leaves(inputs, params, "inputs=", is_part=True)
        known = [i for i, x in enumerate(found) if x is not None]
        scores: list[Any] = [None] * len(leaves)
        for i, (of_leaf, _) in zip(known, axes_of_leaves(axes, names, shapes, known), strict=True):
            scores[i] = jnp.abs(leaves[i]) * _input_norms(names[i], jnp.asarray(found[i]), of_leaf, shapes[i])
        return treedef.unflatten(scores)

    return score


def _input_norms(name: str, x: jax.Array, axes: Axes, shape: tuple[int, ...]) -> jax.Array:
    """The norm of each input, to be multiplied with the leaf."""
    stack, inputs = (tuple(shape[axis] for axis in role) for role in (axes.stack, axes.inputs))
    samples = tuple(range(len(stack), x.ndim - len(inputs)))
    if x.ndim < len(stack) + len(inputs) or (x.shape[: len(stack)], x.shape[x.ndim - len(inputs) :]) != (stack, inputs):
        expected = ", ".join(map(str, (*stack, "...", *inputs)))
        raise ValueError(
            f"inputs= must have activations of the shape [{expected}] for {name or 'the parameter'}, whose shape is "
            f"{list(shape)}, got {list(x.shape)}; axes= says which of its axes are inputs."
        )
    norms = jnp.sqrt(jnp.sum(jnp.square(x.astype(wide_dtype(x.dtype))), samples))
    order = (*axes.stack, *axes.inputs)
    norms = jnp.transpose(norms, sorted(range(len(order)), key=order.__getitem__))
    return jnp.expand_dims(norms, [axis for axis in range(len(shape)) if axis not in order])
