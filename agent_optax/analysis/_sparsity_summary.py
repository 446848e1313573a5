"""A table of the layers: how dense each is, how much of it was explored, what it costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from agent_optax._tree import is_masked
from agent_optax.analysis._forward_flops import forward_flops
from agent_optax.sparsity._default_axes import AxesChoice, axes_of_leaves, check_axes
from agent_optax.sparsity._given_masks import given_masks
from agent_optax.sparsity._leaf_names import leaf_names
from agent_optax.sparsity._masks import active_masks
from agent_optax.sparsity._matching import matched_leaves
from agent_optax.sparsity._state import find_sparsify
from agent_optax.sparsity.storages._compact_active import unpack_bits


class LayerSummary(NamedTuple):
    """One parameter in a `SparsitySummary`, a layer of a pruned one that is a stack of them, or several together."""

    name: str  # its path, such as "Dense_0/kernel", with a number for a layer of a stack
    shape: tuple[int, ...]
    num_weights: int
    num_active: int
    num_ever_active: int | None  # None where nothing is pruned, or nobody kept count
    flops: int | None  # of a forward pass, were it dense; None without apply_fn
    sparse_flops: int | None  # with active weights only

    def density(self) -> float:
        """The share of active weights."""
        return self.num_active / max(self.num_weights, 1)

    def explored(self) -> float | None:
        """The share of weights that were ever active."""
        return None if self.num_ever_active is None else self.num_ever_active / max(self.num_weights, 1)


class SparsitySummary(NamedTuple):
    """What `sparsity_summary` gives; ``str()`` of it is a table."""

    layers: tuple[LayerSummary, ...]  # in the order of the leaves of params
    pruned: LayerSummary | None  # the pruned leaves together; None if there is none
    total: LayerSummary  # all leaves, and products that no parameter takes part in
    other_flops: int | None  # of the latter alone; None without apply_fn

    def __str__(self) -> str:
        """The table."""
        header = ["layer", "shape", "weights", "active", "density", "explored"]
        rows = [_cells(layer) for layer in self.layers]
        sums = [] if self.pruned is None else [_cells(self.pruned)]
        if self.other_flops:
            flops = _si(self.other_flops)
            sums.append(["other products", "", "", "", "", "", flops, flops])
        sums.append(_cells(self.total))
        if self.other_flops is not None:
            header += ["FLOPs", "sparse FLOPs"]
        return _table(header, rows, sums)


def sparsity_summary(
    params: optax.Params,
    opt_state: optax.OptState | None = None,
    *,
    masks: Any = None,
    apply_fn: Callable[..., Any] | None = None,
    example_inputs: Sequence[Any] = (),
    axes: AxesChoice = None,
) -> SparsitySummary:
    r"""Summarizes layer by layer how sparse a network is, and what a forward pass costs.

    .. math::
        d_l = \frac{\text{active}_l}{n_l}, \qquad
        R_l = \frac{\text{ever active}_l}{n_l}, \qquad
        \mathrm{FLOPs}^{sparse}_l = d_l\, \mathrm{FLOPs}_l

    The FLOPs are those of `forward_flops`. In a dense layer and in a convolution each weight takes part in equally many
    products, so the sparse ones are exact for hardware that skips zeros. Not for use under `jax.jit`.

    Args:
        params: a tree of arrays.
        opt_state: the state of an optimizer that holds `agent_optax.sparsify`, of either storage and at any depth.
            Default None: the density comes from `masks`.
        masks: in place of `opt_state`, a tree like `params` of bool arrays, None where nothing is pruned. Default None:
            without an `opt_state` either, all weights are active.
        apply_fn: ``apply_fn(params, *example_inputs) -> outputs``, the model. Default None: no FLOPs.
        example_inputs: a sequence of its inputs, arrays or `jax.ShapeDtypeStruct`; a batch of one gives the cost of
            one sample.
        axes: what the axes of leaves are, as for `agent_optax.sparsify`: each layer of a stack has a row of its own.
            Default None: by the conventions of Flax.

    Returns:
        A `SparsitySummary`; print it.

    Raises:
        ValueError: if `opt_state` holds no `sparsify`, both `opt_state` and `masks` are given, `masks` does not fit
            `params`, or there are `example_inputs` without an `apply_fn`; as `forward_flops`.
        jax.errors.ConcretizationTypeError: under `jax.jit`.

    Example:
        >>> import agent_optax, jax.numpy as jnp, optax
        >>> from agent_optax import analysis
        >>> params = {"hidden": {"kernel": jnp.ones((64, 300)), "bias": jnp.ones(300)}}
        >>> tx = agent_optax.sparsify(optax.sgd(0.1), agent_optax.rigl(), sparsity=0.9)
        >>> def apply_fn(params, x):
        ...     return x @ params["hidden"]["kernel"] + params["hidden"]["bias"]
        >>> x = jnp.ones((1, 64))
        >>> print(analysis.sparsity_summary(params, tx.init(params), apply_fn=apply_fn, example_inputs=[x]))
        layer          shape   weights  active  density  explored  FLOPs  sparse FLOPs
        ------------------------------------------------------------------------------
        hidden/bias    300         300     300   1.0000         -      0             0
        hidden/kernel  64x300    19200    1920   0.1000    0.1000  38.4k         3.84k
        ------------------------------------------------------------------------------
        pruned                   19200    1920   0.1000    0.1000  38.4k         3.84k
        total                    19500    2220   0.1138         -  38.4k         3.84k

    References:
        Liu et al., In-Time Over-Parameterization, ICML 2021, for the explored fraction; Evci et al., Rigging the
        Lottery, ICML 2020, for FLOPs.
    """
    if opt_state is not None and masks is not None:
        raise ValueError("pass opt_state or masks, not both: the masks of opt_state are the ones that training uses.")
    if apply_fn is None and len(example_inputs):
        raise ValueError(
            f"example_inputs= needs apply_fn=, got {len(example_inputs)} inputs without it: pass "
            "apply_fn=lambda params, x: ..., the model."
        )
    check_axes(axes)
    leaves, treedef = jax.tree.flatten(params)
    active: list[Any] = [None] * len(leaves)
    ever: list[Any] = [None] * len(leaves)
    if opt_state is not None:
        active = treedef.flatten_up_to(active_masks(opt_state, params))
        ever = _ever_active(opt_state, params, active)
    elif masks is not None:
        active = [None if is_masked(mask) else mask for mask in treedef.flatten_up_to(given_masks(params, masks))]
    flops, other = None, None
    if apply_fn is not None:
        counted = forward_flops(apply_fn, params, *example_inputs)
        flops, other = jax.tree.leaves(counted.per_leaf), counted.other

    names = leaf_names(params)
    shapes = [jnp.shape(leaf) for leaf in leaves]
    pruned_indices = [i for i, mask in enumerate(active) if mask is not None]
    own_axes = dict(zip(pruned_indices, axes_of_leaves(axes, names, shapes, pruned_indices), strict=True))
    layers, pruned = [], []
    for i, (name, shape) in enumerate(zip(names, shapes, strict=True)):
        dense = None if flops is None else flops[i]
        if active[i] is None:
            size = math.prod(shape)
            layers.append(LayerSummary(name, shape, size, size, None, dense, dense))
            continue
        own = own_axes[i].axes
        own_ever = None if ever[i] is None else own.unstacked(ever[i])
        for k, mask in enumerate(own.unstacked(jnp.asarray(active[i]))):
            num_active = int(jnp.sum(mask, dtype=jnp.int32))
            of_layer = None if dense is None else round(dense / own.num_layers(shape))
            pruned.append(
                LayerSummary(
                    name=f"{name}[{k}]" if own.stack else name,
                    shape=tuple(n for axis, n in enumerate(shape) if axis not in own.stack),
                    num_weights=mask.size,
                    num_active=num_active,
                    num_ever_active=None if own_ever is None else int(jnp.sum(own_ever[k], dtype=jnp.int32)),
                    flops=of_layer,
                    sparse_flops=None if of_layer is None else round(of_layer * num_active / max(mask.size, 1)),
                )
            )
            layers.append(pruned[-1])
    return SparsitySummary(
        layers=tuple(layers),
        pruned=_together("pruned", pruned) if pruned else None,
        total=_together("total", layers, other),
        other_flops=other,
    )


def _ever_active(opt_state: optax.OptState, params: optax.Params, active: list[Any]) -> list[Any]:
    """For each leaf a mask of the weights that were ever active; None where nothing is pruned."""
    found = list(active)
    for state in find_sparsify(opt_state):
        kept = state.active_weights.ever_active
        if kept is None:  # a static topology, where what is active always was
            continue
        for i, record in enumerate(matched_leaves(kept, params, "the state", is_part=True)):
            if record is not None:  # packed in compact storage
                found[i] = unpack_bits(record, active[i]) if record.dtype == jnp.uint8 else record
    return found


def _together(name: str, layers: Sequence[LayerSummary], other_flops: int | None = None) -> LayerSummary:
    def total(numbers: list[int | None]) -> int | None:
        return None if None in numbers else sum(n for n in numbers if n is not None)

    extra = [] if other_flops is None else [other_flops]
    return LayerSummary(
        name=name,
        shape=(),
        num_weights=sum(layer.num_weights for layer in layers),
        num_active=sum(layer.num_active for layer in layers),
        num_ever_active=total([layer.num_ever_active for layer in layers]),
        flops=total([layer.flops for layer in layers] + extra),
        sparse_flops=total([layer.sparse_flops for layer in layers] + extra),
    )


def _cells(layer: LayerSummary) -> list[str]:
    explored = layer.explored()
    cells = [
        layer.name,
        "x".join(map(str, layer.shape)),
        str(layer.num_weights),
        str(layer.num_active),
        f"{layer.density():.4f}",
        "-" if explored is None else f"{explored:.4f}",
    ]
    if layer.flops is not None and layer.sparse_flops is not None:
        cells += [_si(layer.flops), _si(layer.sparse_flops)]
    return cells


def _si(number: int) -> str:
    """With four significant digits and k, M, G or T."""
    scaled, prefix = float(number), ""
    for prefix_of_next in ("k", "M", "G", "T"):
        if scaled < 999.95:
            break
        scaled, prefix = scaled / 1000, prefix_of_next
    return f"{scaled:.4g}{prefix}"


def _table(header: list[str], rows: list[list[str]], sums: list[list[str]]) -> str:
    """Columns of equal width; names and shapes to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, *sums, strict=True)]

    def line(cells: list[str]) -> str:
        placed = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(placed).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([line(header), rule, *map(line, rows), rule, *map(line, sums)])
