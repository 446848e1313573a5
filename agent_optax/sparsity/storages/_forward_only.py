"""An error that names the remedy, where JAX would say that it cannot differentiate a loop in reverse."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def forward_only(tree: Any) -> Any:
    """The tree as it is; ValueError if it is differentiated in reverse."""
    return jax.tree.map(lambda x: _forward_only(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x, tree)


@jax.custom_jvp
def _forward_only(x: jax.Array) -> jax.Array:
    return x


@_forward_only.defjvp
def _forward_only_jvp(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
    (x,), (tangent,) = primals, tangents
    return x, jax.custom_derivatives.linear_call(lambda _, t: t, _refuse, (), tangent)


def _refuse(_: Any, cotangent: Any) -> Any:
    raise ValueError(
        "gradients through optimizer steps need storage='dense': storage='compact' moves its state inside a loop, "
        "which cannot be differentiated in reverse."
    )
