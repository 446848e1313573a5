"""Sparse layers as modules of Linen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from agent_optax._validation import check_fraction
from agent_optax.layers import FanIn, init_values, sparse_conv, sparse_dot


class SparseDense(nn.Module):
    r"""`flax.linen.Dense` with a sparse kernel, of which only the weights that exist are held.

    .. math::
        y = x W + b, \qquad W_{io} = 0 \text{ unless the connections have } (i, o)

    Parameters: ``values`` [features, k], ``bias`` [features]. The connections, `agent_optax.layers.FanIn`, are a
    variable of the collection ``"connections"``: pass it to ``apply`` with the parameters.

    Attributes:
        features: the number of outputs.
        sparsity: the share of weights that do not exist, in [0, 1). Each output has k = max(1, round((1 - sparsity) *
            inputs)) inputs.
        group: how many consecutive outputs share their inputs. Default 16; see `agent_optax.layers.FanIn`.
        use_bias: whether to add a bias. Default True.
        dtype: of the computation. Default None: that to which inputs and parameters promote.
        param_dtype: of the parameters. Default float32.
        kernel_init: initializer of dense kernels, called for k inputs; see `agent_optax.layers.init_values`. Default
            None: LeCun's normal, as in Flax.
        bias_init: initializer of the bias. Default zeros, as in Flax.

    Raises:
        ValueError: at the first call, if a number is out of range.

    Example:
        >>> import agent_optax.flax, jax, jax.numpy as jnp
        >>> layer = agent_optax.flax.linen.SparseDense(32, sparsity=0.875)
        >>> variables = layer.init(jax.random.key(0), jnp.ones((4, 64)))
        >>> sorted(variables), variables["params"]["values"].shape
        (['connections', 'params'], (32, 8))
        >>> layer.apply(variables, jnp.ones((4, 64))).shape
        (4, 32)
    """

    features: int
    sparsity: float
    group: int = 16
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Callable[..., Any] | None = None
    bias_init: Callable[..., Any] = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """[..., inputs] -> [..., features]."""
        connections, inputs, values, bias = _operands(self, inputs, inputs.shape[-1])
        y = sparse_dot(inputs, values, connections)
        return y if bias is None else y + bias


class SparseConv(nn.Module):
    r"""`flax.linen.Conv` in two dimensions with a sparse kernel, of which only the weights that exist are held.

    Connections are over height, width and input channels of the kernel; see `agent_optax.layers.sparse_conv`. They are
    a variable of the collection ``"connections"``.

    Attributes:
        features: the number of output channels.
        kernel_size: height and width of the kernel.
        sparsity: the share of weights that do not exist, in [0, 1).
        strides: of the output in each direction, or one number for both. Default 1.
        padding: "SAME", "VALID", or ((top, bottom), (left, right)) zeros. Default "SAME".
        group: how many consecutive outputs share their inputs. Default 16; see `agent_optax.layers.FanIn`.
        use_bias: whether to add a bias. Default True.
        dtype: of the computation. Default None: that to which inputs and parameters promote.
        param_dtype: of the parameters. Default float32.
        kernel_init: initializer of dense kernels, called for k inputs. Default None: LeCun's normal, as in Flax.
        bias_init: initializer of the bias. Default zeros, as in Flax.

    Raises:
        ValueError: at the first call, if a number is out of range.

    Example:
        >>> import agent_optax.flax, jax, jax.numpy as jnp
        >>> layer = agent_optax.flax.linen.SparseConv(32, (3, 3), sparsity=0.95)
        >>> variables = layer.init(jax.random.key(0), jnp.ones((4, 8, 8, 16)))
        >>> layer.apply(variables, jnp.ones((4, 8, 8, 16))).shape, variables["params"]["values"].shape
        ((4, 8, 8, 32), (32, 7))
    """

    features: int
    kernel_size: Sequence[int]
    sparsity: float
    strides: int | Sequence[int] = 1
    padding: str | Sequence[tuple[int, int]] = "SAME"
    group: int = 16
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Callable[..., Any] | None = None
    bias_init: Callable[..., Any] = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """[..., height, width, channels] -> [..., output height, output width, features]."""
        height, width = self.kernel_size
        connections, inputs, values, bias = _operands(self, inputs, height * width * inputs.shape[-1])
        y = sparse_conv(
            inputs, values, connections, kernel_size=(height, width), strides=self.strides, padding=self.padding
        )
        return y if bias is None else y + bias


def _operands(layer: SparseDense | SparseConv, inputs: jax.Array, num_inputs: int) -> tuple[Any, ...]:
    """Connections, and inputs, weights and bias in the dtype of the computation."""
    check_fraction("sparsity", layer.sparsity, "it is the share of weights that do not exist", below_one=True)

    def connect() -> FanIn:
        return FanIn.random(
            layer.make_rng("params"),
            inputs=num_inputs,
            outputs=layer.features,
            density=1 - layer.sparsity,
            group=layer.group,
        )

    connections = layer.variable("connections", "connections", connect).value

    def init(key: jax.Array) -> jax.Array:
        return init_values(key, connections, layer.kernel_init, layer.param_dtype)

    values = layer.param("values", init)
    bias = layer.param("bias", layer.bias_init, (layer.features,), layer.param_dtype) if layer.use_bias else None
    return connections, *promote_dtype(inputs, values, bias, dtype=layer.dtype)
