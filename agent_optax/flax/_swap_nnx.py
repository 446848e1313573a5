"""Sparse layers in place of the dense ones of an NNX model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from agent_optax._validation import check_fraction
from agent_optax.export._merge import check_inactive_are_zero, mask_of_each_leaf
from agent_optax.flax._sparse_nnx import ZEROS, Initializer, SparseConv, SparseLinear, connections_in
from agent_optax.layers import connections_of, from_dense, to_dense
from agent_optax.sparsity import erk
from agent_optax.sparsity._leaf_names import leaf_names


def sparse_layers(
    model: nnx.Module,
    *,
    sparsity: float,
    distribution: Callable[[Sequence[tuple[int, ...]], float], list[float]] = erk,
    where: Callable[[str, nnx.Module], bool] | None = None,
    group: int = 16,
    kernel_init: Initializer | None = None,
    rngs: nnx.Rngs,
) -> None:
    """Puts sparse layers in place of the dense ones of a model, in place.

    Each `flax.nnx.Linear` becomes a `SparseLinear`, and each `flax.nnx.Conv` in two dimensions, without dilation and
    feature groups, a `SparseConv`, with the dense layer's bias, dtypes, strides and padding. Weights are drawn anew,
    for the inputs that an output has now. A layer whose density comes out as 1 stays as it is, as other modules do:
    attention's projections, embeddings, norms. Build the optimizer afterwards.

    Args:
        model: the model.
        sparsity: the share of weights of these layers that are not to exist, in [0, 1).
        distribution: how the sparsity is shared among layers: `agent_optax.erk`, `agent_optax.uniform`,
            `agent_optax.erdos_renyi`, or ``distribution(kernel_shapes, sparsity) -> densities``. Default
            `agent_optax.erk`.
        where: ``where(path, layer) -> bool`` chooses among these layers; paths are like ``"blocks/0/mlp/up"``. Default
            None: all of them.
        group: how many consecutive outputs share their inputs. Default 16.
        kernel_init: initializer of dense kernels, called for k inputs. Default None: LeCun's normal, as in Flax.
        rngs: random keys; "params" is used.

    Raises:
        ValueError: if `sparsity` is out of range, no layer is chosen, the model itself is the layer, or a layer is used
            in several places of the model.

    Example:
        >>> import agent_optax.flax, jax.numpy as jnp
        >>> from flax import nnx
        >>> model = nnx.Sequential(
        ...     nnx.Linear(64, 128, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(128, 10, rngs=nnx.Rngs(1))
        ... )
        >>> agent_optax.flax.nnx.sparse_layers(model, sparsity=0.8, rngs=nnx.Rngs(2))
        >>> [type(layer).__name__ for layer in model.layers if isinstance(layer, nnx.Module)]
        ['SparseLinear', 'SparseLinear']
        >>> model(jnp.ones((2, 64))).shape
        (2, 10)
    """
    check_fraction("sparsity", sparsity, "it is the share of weights that do not exist, such as 0.9", below_one=True)
    dense: list[tuple[Any, Any]] = [
        (path, layer)
        for path, layer in modules_of(model)
        if is_replaceable(layer) and (where is None or where("/".join(map(str, path)), layer))
    ]
    if not dense:
        raise ValueError("no nnx.Linear or two-dimensional nnx.Conv of the model is chosen: look at where=.")
    densities = distribution([layer.kernel.shape for _, layer in dense], sparsity)
    swap(
        model,
        [
            (path, layer, sparse_layer(layer, kernel_init, rngs, sparsity=1 - density, group=group))
            for (path, layer), density in zip(dense, densities, strict=True)
            if density < 1
        ],
    )


def to_sparse_layers(model: nnx.Module, masks: Any, *, group: int | None = None) -> None:
    """Puts sparse layers in place of the pruned ones of a model, with their weights, in place: outputs stay the same.

    What `agent_optax.sparsify` has trained as a dense kernel with zeros becomes a layer that does not touch them. Each
    pruned `flax.nnx.Linear` becomes a `SparseLinear`, each pruned `flax.nnx.Conv` in two dimensions, without dilation
    and feature groups, a `SparseConv`. Connections are the fastest that a mask allows: see
    `agent_optax.layers.connections_of`. Biases and other modules, such as norms, stay as they are. Build the optimizer
    afterwards.

    Args:
        model: the model.
        masks: what `agent_optax.active_masks` returns, or the state of an optimizer that holds `agent_optax.sparsify`,
            as `agent_optax.flax.nnx.opt_state` returns it.
        group: how many consecutive outputs share their inputs, where they do. Default None: as many as do in each mask,
            so the G of ``sparsify(..., pattern=fan_in(group=G))``.

    Raises:
        ValueError: if `masks` does not fit the model, an inactive weight is not zero, no layer is pruned, the model
            itself is the layer, or a layer is used in several places of the model.

    Example:
        >>> import agent_optax, agent_optax.flax, jax.numpy as jnp, optax
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Linear(64, 32, rngs=nnx.Rngs(0)))
        >>> tx = agent_optax.sparsify(
        ...     optax.sgd(0.1), agent_optax.rigl(), sparsity=0.9, pattern=agent_optax.fan_in(group=16)
        ... )
        >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        >>> agent_optax.flax.nnx.mask_model(model, optimizer)
        >>> before = model(jnp.ones((1, 64)))
        >>> agent_optax.flax.nnx.to_sparse_layers(model, agent_optax.flax.nnx.opt_state(optimizer))
        >>> type(model.layers[0]).__name__, model.layers[0].values.shape
        ('SparseLinear', (32, 6))
        >>> bool(jnp.allclose(model(jnp.ones((1, 64))), before, atol=1e-6))
        True
    """
    params = nnx.state(model, nnx.Param)
    masked = dict(zip(leaf_names(params), mask_of_each_leaf(params, masks), strict=True))
    swaps = []
    for path, layer in modules_of(model):
        name = "/".join([*map(str, path), "kernel"])
        if not is_replaceable(layer) or masked.get(name) is None:
            continue
        kernel, mask = layer.kernel[...], masked[name]
        check_inactive_are_zero(name, kernel, mask)
        made = connections_of(np.asarray(mask).reshape(-1, mask.shape[-1]), group=group)
        sparse = sparse_layer(layer, ZEROS, nnx.Rngs(0), connections=made)
        sparse.values[...] = from_dense(kernel.reshape(-1, kernel.shape[-1]), made)
        swaps.append((path, layer, sparse))
    if not swaps:
        raise ValueError("masks holds none for an nnx.Linear or two-dimensional nnx.Conv of the model.")
    swap(model, swaps)


def to_dense_layers(model: nnx.Module) -> Any:
    """Puts dense layers in place of the sparse ones of a model, in place: the inverse of `to_sparse_layers`.

    Each `SparseLinear` becomes a `flax.nnx.Linear`, each `SparseConv` a `flax.nnx.Conv`, with the same bias and with
    zeros where no weight exists: outputs stay the same. Build the optimizer afterwards.

    Args:
        model: the model.

    Returns:
        The masks, a tree like ``flax.nnx.state(model, flax.nnx.Param)`` with None where nothing is pruned: what
        ``agent_optax.sparsify(..., masks=)`` takes.

    Raises:
        ValueError: if the model has no sparse layer, the model itself is the layer, or a layer is used in several
            places of the model.

    Example:
        >>> import agent_optax.flax, jax.numpy as jnp
        >>> from flax import nnx
        >>> model = nnx.Sequential(agent_optax.flax.nnx.SparseLinear(64, 32, sparsity=0.875, rngs=nnx.Rngs(0)))
        >>> before = model(jnp.ones((1, 64)))
        >>> masks = agent_optax.flax.nnx.to_dense_layers(model)
        >>> type(model.layers[0]).__name__, int((model.layers[0].kernel[...] != 0).sum())
        ('Linear', 256)
        >>> bool(jnp.allclose(model(jnp.ones((1, 64))), before, atol=1e-6))
        True
    """
    swaps = [
        (path, layer, _dense(layer)) for path, layer in modules_of(model) if type(layer) in (SparseLinear, SparseConv)
    ]
    if not swaps:
        raise ValueError("the model has no SparseLinear and no SparseConv.")
    swap(model, swaps)
    masks = {
        "/".join([*map(str, path), "kernel"]): connections_in(layer).mask().reshape(dense.kernel.shape)
        for path, layer, dense in swaps
    }
    params = nnx.state(model, nnx.Param)
    return jax.tree.structure(params).unflatten([masks.get(name) for name in leaf_names(params)])


def swap(model: nnx.Module, swaps: Sequence[tuple[Any, Any, nnx.Module]]) -> None:
    """Puts new layers in the places of old ones; all or none."""
    if any(layer is model for _, layer, _ in swaps):
        raise ValueError("the model itself is the layer: put it into one, such as flax.nnx.Sequential(layer).")
    for path, _, sparse in swaps:
        _replace(model, path, sparse)
    remaining = {id(module) for _, module in modules_of(model)}
    shared = ["/".join(map(str, path)) for path, layer, _ in swaps if id(layer) in remaining]
    if shared:
        for path, layer, _ in swaps:
            _replace(model, path, layer)
        raise ValueError(
            f"{shared[0]} is used in several places of the model: leave it out with where=, or give each place a layer "
            "of its own."
        )


def modules_of(model: Any) -> list[tuple[Any, Any]]:
    """The modules of a model, and the paths to them."""
    return list(nnx.iter_modules(model) if hasattr(nnx, "iter_modules") else model.iter_modules())  # flax < 0.12


def is_replaceable(layer: Any) -> bool:
    """Whether a sparse layer can take the place of a layer."""
    if type(layer) is nnx.Linear:
        return True
    return (
        type(layer) is nnx.Conv
        and len(layer.kernel.shape) == 4
        and layer.feature_group_count == 1
        and layer.mask is None
        and _both(layer.kernel_dilation) == _both(layer.input_dilation) == (1, 1)
        and _padding(layer) is not None
    )


def _both(numbers: Any) -> tuple[int, int]:
    return (numbers, numbers) if isinstance(numbers, int) else tuple(numbers)


def _padding(layer: nnx.Conv) -> Any:
    """As `SparseConv` takes it; None if it takes no such padding."""
    padding = layer.padding
    if isinstance(padding, str):
        return padding if padding in ("SAME", "VALID") else None
    if isinstance(padding, int):
        return ((padding, padding),) * 2
    return tuple((p, p) if isinstance(p, int) else tuple(p) for p in padding)


def sparse_layer(
    layer: Any, kernel_init: Initializer | None, rngs: nnx.Rngs, **which: Any
) -> SparseLinear | SparseConv:
    """A sparse layer of the same shape, with the same bias; `which` is its sparsity and group, or its connections."""
    *window, inputs, outputs = layer.kernel.shape
    options: dict[str, Any] = {
        **which,
        "use_bias": layer.bias is not None,
        "dtype": layer.dtype,
        "param_dtype": layer.param_dtype,
        "kernel_init": kernel_init,
        "rngs": rngs,
    }
    if window:
        strides = 1 if layer.strides is None else layer.strides
        sparse = SparseConv(inputs, outputs, tuple(window), strides=strides, padding=_padding(layer), **options)
    else:
        sparse = SparseLinear(inputs, outputs, **options)
    if layer.bias is not None:
        sparse.bias = layer.bias
    return sparse


def _dense(layer: SparseLinear | SparseConv) -> nnx.Linear | nnx.Conv:
    """A dense layer with the same weights and the same bias."""
    options: dict[str, Any] = {
        "use_bias": layer.bias is not None,
        "dtype": layer.dtype,
        "param_dtype": layer.values[...].dtype,
        "kernel_init": ZEROS,
        "rngs": nnx.Rngs(0),
    }
    if isinstance(layer, SparseConv):
        shape = (layer.in_features, layer.out_features, layer.kernel_size)
        dense = nnx.Conv(*shape, strides=layer.strides, padding=layer.padding, **options)
    else:
        dense = nnx.Linear(layer.in_features, layer.out_features, **options)
    dense.kernel[...] = to_dense(layer.values[...], connections_in(layer)).reshape(dense.kernel.shape)
    if layer.bias is not None:
        dense.bias = layer.bias
    return dense


def _replace(model: Any, path: Sequence[Any], module: nnx.Module) -> None:
    """Puts a module where the path leads."""
    *outer, name = path
    for part in outer:
        model = model[part] if isinstance(part, int) or isinstance(model, dict) else getattr(model, part)
    if isinstance(name, int) or isinstance(model, dict):
        model[name] = module
    else:
        setattr(model, name, module)
