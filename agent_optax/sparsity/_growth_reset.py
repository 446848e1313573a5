"""What growth does to the state of the inner optimizer: it starts again, whatever optimizer it is."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from agent_optax._tree import is_masked


def reset_grown(
    inner: optax.GradientTransformation, inner_state: optax.OptState, params: optax.Params, grown: Any
) -> optax.OptState:
    """The inner state with its initial value at grown weights.

    Per-parameter states are found as `optax.tree.map_params` finds them. An array whose trailing axes are not those of
    its parameter (a factored second moment, say) has no entry for a single weight and stays. A state with a method
    ``after_growth`` has the last word.
    """
    fresh = inner.init(params)
    flags = jax.tree.map(lambda mask, p: False if is_masked(mask) else mask, grown, params, is_leaf=is_masked)
    flags = optax.tree.map_params(
        inner.init,
        lambda leaf, flag: leaf if is_masked(leaf) else flag,
        inner_state,
        flags,
        transform_non_params=lambda _: False,
        is_leaf=is_masked,
    )

    def reset(flag: Any, new: Any, old: Any) -> Any:
        if flag is False or old.shape[old.ndim - flag.ndim :] != flag.shape:
            return old
        return jnp.where(flag, new, old)

    moved = jax.tree.map(reset, flags, fresh, inner_state)
    decides = lambda node: hasattr(node, "after_growth")  # noqa: E731
    return jax.tree.map(
        lambda old, new: old.after_growth(new) if decides(old) else new, inner_state, moved, is_leaf=decides
    )
