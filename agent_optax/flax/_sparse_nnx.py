"""Sparse layers as modules of NNX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.linen.dtypes import promote_dtype

from agent_optax._validation import check_fraction
from agent_optax.layers import Connections, FanIn, init_values, sparse_conv, sparse_dot

Initializer = Callable[..., Any]

ZEROS = nnx.initializers.zeros_init()


class SparseConnections(nnx.Variable):
    """The connections of a sparse layer: arrays that no optimizer of parameters sees, saved with the model."""


class SparseLinear(nnx.Module):
    r"""`flax.nnx.Linear` with a sparse kernel, of which only the weights that exist are held.

    .. math::
        y = x W + b, \qquad W_{io} = 0 \text{ unless the connections have } (i, o)

    Attributes:
        values: `flax.nnx.Param` [out_features, k]: the weights; any optimizer works on them as they are.
        bias: `flax.nnx.Param` [out_features], or None.
        connections: `SparseConnections`: which weights exist; `agent_optax.layers.Connections` in a variable.

    Args:
        in_features: the number of inputs.
        out_features: the number of outputs.
        sparsity: the share of weights that do not exist, in [0, 1). Each output has
            k = max(1, round((1 - sparsity) * in_features)) inputs.
        group: how many consecutive outputs share their inputs. Default 16; see `agent_optax.layers.FanIn`.
        connections: in place of `sparsity` and `group`, given connections, such as
            `agent_optax.layers.AnyMask.from_mask` makes.
        use_bias: whether to add a bias. Default True.
        dtype: of the computation. Default None: that to which inputs and parameters promote.
        param_dtype: of the parameters. Default float32.
        kernel_init: initializer of dense kernels, called for k inputs; see `agent_optax.layers.init_values`. Default
            None: LeCun's normal, as in Flax.
        bias_init: initializer of the bias. Default zeros, as in Flax.
        rngs: random keys; "params" is used.

    Raises:
        ValueError: if a number is out of range, `connections` have other numbers of inputs or outputs, or not exactly
            one of `sparsity` and `connections` is given.

    Example:
        >>> import agent_optax.flax, jax.numpy as jnp, optax
        >>> from flax import nnx
        >>> layer = agent_optax.flax.nnx.SparseLinear(64, 32, sparsity=0.875, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((4, 64))).shape, layer.values.shape
        ((4, 32), (32, 8))
        >>> optimizer = nnx.Optimizer(layer, optax.adam(1e-3), wrt=nnx.Param)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sparsity: float | None = None,
        group: int = 16,
        connections: Connections | None = None,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Initializer | None = None,
        bias_init: Initializer = ZEROS,
        rngs: nnx.Rngs,
    ):
        made = _connections(in_features, out_features, sparsity, group, connections, rngs)
        self.connections = SparseConnections(made)
        self.values = nnx.Param(init_values(rngs.params(), made, kernel_init, param_dtype))
        self.bias = nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype)) if use_bias else None
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """[..., in_features] -> [..., out_features]."""
        bias = None if self.bias is None else self.bias[...]
        inputs, values, bias = promote_dtype(inputs, self.values[...], bias, dtype=self.dtype)
        y = sparse_dot(inputs, values, connections_in(self))
        return y if bias is None else y + bias


class SparseConv(nnx.Module):
    r"""`flax.nnx.Conv` in two dimensions with a sparse kernel, of which only the weights that exist are held.

    Connections are over height, width and input channels of the kernel; see `agent_optax.layers.sparse_conv`.

    Attributes:
        values: `flax.nnx.Param` [out_features, k]: the weights.
        bias: `flax.nnx.Param` [out_features], or None.
        connections: `SparseConnections`: which weights exist.

    Args:
        in_features: the number of input channels.
        out_features: the number of output channels.
        kernel_size: height and width of the kernel, or one number for both.
        strides: of the output in each direction, or one number for both. Default 1.
        padding: "SAME", "VALID", or ((top, bottom), (left, right)) zeros. Default "SAME".
        sparsity: the share of weights that do not exist, in [0, 1). Each output has
            k = max(1, round((1 - sparsity) * height * width * in_features)) inputs.
        group: how many consecutive outputs share their inputs. Default 16; see `agent_optax.layers.FanIn`.
        connections: in place of `sparsity` and `group`, given connections with height * width * in_features inputs.
        use_bias: whether to add a bias. Default True.
        dtype: of the computation. Default None: that to which inputs and parameters promote.
        param_dtype: of the parameters. Default float32.
        kernel_init: initializer of dense kernels, called for k inputs. Default None: LeCun's normal, as in Flax.
        bias_init: initializer of the bias. Default zeros, as in Flax.
        rngs: random keys; "params" is used.

    Raises:
        ValueError: if a number is out of range, `connections` have other numbers of inputs or outputs, or not exactly
            one of `sparsity` and `connections` is given.

    Example:
        >>> import agent_optax.flax, jax.numpy as jnp
        >>> from flax import nnx
        >>> layer = agent_optax.flax.nnx.SparseConv(16, 32, 3, strides=2, sparsity=0.95, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((4, 8, 8, 16))).shape, layer.values.shape
        ((4, 4, 4, 32), (32, 7))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        *,
        strides: int | Sequence[int] = 1,
        padding: str | Sequence[tuple[int, int]] = "SAME",
        sparsity: float | None = None,
        group: int = 16,
        connections: Connections | None = None,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Initializer | None = None,
        bias_init: Initializer = ZEROS,
        rngs: nnx.Rngs,
    ):
        height, width = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        made = _connections(height * width * in_features, out_features, sparsity, group, connections, rngs)
        self.connections = SparseConnections(made)
        self.values = nnx.Param(init_values(rngs.params(), made, kernel_init, param_dtype))
        self.bias = nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype)) if use_bias else None
        self.in_features = in_features
        self.out_features = out_features
        self.kernel_size = (height, width)
        self.strides = strides if isinstance(strides, int) else tuple(strides)
        self.padding = padding if isinstance(padding, str) else tuple((low, high) for low, high in padding)
        self.dtype = dtype

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """[..., height, width, in_features] -> [..., output height, output width, out_features]."""
        bias = None if self.bias is None else self.bias[...]
        inputs, values, bias = promote_dtype(inputs, self.values[...], bias, dtype=self.dtype)
        y = sparse_conv(
            inputs,
            values,
            connections_in(self),
            kernel_size=self.kernel_size,
            strides=self.strides,
            padding=self.padding,
        )
        return y if bias is None else y + bias


def _connections(
    inputs: int, outputs: int, sparsity: float | None, group: int, connections: Connections | None, rngs: nnx.Rngs
) -> Connections:
    """The given ones, or random ones."""
    if (sparsity is None) == (connections is None):
        raise ValueError(f"give either sparsity= or connections=, got {sparsity!r} and {connections!r}.")
    if sparsity is not None:
        hint = "it is the share of weights that do not exist, such as 0.9"
        check_fraction("sparsity", sparsity, hint, below_one=True)
        return FanIn.random(rngs.params(), inputs=inputs, outputs=outputs, density=1 - sparsity, group=group)
    assert connections is not None
    if (connections.inputs, connections.outputs) != (inputs, outputs):
        raise ValueError(
            f"the layer has {inputs} inputs and {outputs} outputs, its connections {connections.inputs} and "
            f"{connections.outputs}."
        )
    return connections


def connections_in(layer: SparseLinear | SparseConv) -> Connections:
    """The connections of a layer, without the variable around them."""
    variable: Any = layer.connections
    return variable.get_value() if hasattr(variable, "get_value") else variable.value  # flax < 0.12
