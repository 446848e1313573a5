"""What an equation gives at an inactive entry, where gradient and weight are zero."""

from __future__ import annotations

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FUNCTIONS = {
    "abs": np.abs,
    "add": np.add,
    "add_any": np.add,
    "and": np.bitwise_and,
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
    "copy": lambda x: x,
    "copy_p": lambda x: x,
    "cos": np.cos,
    "div": np.divide,
    "eq": operator.eq,
    "exp": np.exp,
    "ge": operator.ge,
    "gt": operator.gt,
    "is_finite": np.isfinite,
    "le": operator.le,
    "log1p": np.log1p,
    "lt": operator.lt,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "name": lambda x: x,
    "ne": operator.ne,
    "neg": np.negative,
    "not": np.invert,
    "or": np.bitwise_or,
    "pow": np.power,
    "pvary": lambda x: x,
    "reshard": lambda x: x,
    "select_n": lambda which, *cases: cases[int(which)],
    "sharding_constraint": lambda x: x,
    "sign": np.sign,
    "sin": np.sin,
    "sqrt": np.sqrt,
    "square": np.square,
    "stop_gradient": lambda x: x,
    "sub": np.subtract,
    "tan": np.tan,
    "tanh": np.tanh,
    "xor": np.bitwise_xor,
    "convert_element_type": lambda x: x,  # every result is converted
    "broadcast_in_dim": lambda x: x,
    "reshape": lambda x: x,
}


def rest_value(eqn: Any, operands: Any) -> np.ndarray | None:
    """The value of an entrywise equation at an inactive entry, or None if it is not known.

    Zero times a finite number is zero, whatever the number: so the moments of most optimizers stay at zero.
    """
    name, dtype = eqn.primitive.name, eqn.outvars[0].aval.dtype
    rests = [o.rest for o in operands]
    if name == "integer_pow" and rests[0] is not None and (rests[0] != 0 or eqn.params["y"] > 0):
        return np.asarray(rests[0] ** eqn.params["y"], dtype)
    if name == "select_n" and rests[0] is not None:
        return rests[1 + int(rests[0])]
    if name == "select_n" and rests[1] is not None and all(r is not None and r == rests[1] for r in rests[1:]):
        return rests[1]
    if name in ("mul", "and") and any(r is not None and r == 0 for r in rests):
        return np.zeros((), dtype)
    if name == "div" and rests[0] is not None and rests[0] == 0 and (rests[1] is None or rests[1] != 0):
        return np.zeros((), dtype)
    if name == "or" and dtype == np.bool_ and any(r is not None and r for r in rests):
        return np.ones((), dtype)
    if name not in FUNCTIONS or any(r is None for r in rests):
        return None
    if jnp.issubdtype(dtype, jax.dtypes.extended):  # random keys
        return None
    with np.errstate(all="ignore"):
        return np.asarray(FUNCTIONS[name](*rests)).astype(dtype)
