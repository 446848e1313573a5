"""Whether an optimizer is the same program on the active entries alone as on whole parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.extend.core
import numpy as np


def first_difference(full: Any, compact: Any) -> str | None:
    """Where two jaxprs differ in more than the shapes of arrays, in words; None where they do not.

    An optimizer that reads the rank, the shape or the size of a parameter (a weight decay mask by ``ndim``, a rate
    divided by the number of inputs, a mean) makes other equations, or other numbers in them, of other shapes.
    """
    if len(full.invars) != len(compact.invars) or len(full.constvars) != len(compact.constvars):
        return "it takes other arguments"
    if len(full.eqns) != len(compact.eqns):
        return f"{len(full.eqns)} operations become {len(compact.eqns)}"
    given, on_entries = [*full.constvars, *full.invars], [*compact.constvars, *compact.invars]
    places: dict[Any, Any] = dict(zip(given, on_entries, strict=True))

    def same_atom(a: Any, b: Any) -> bool:
        if isinstance(a, jax.extend.core.Literal) or isinstance(b, jax.extend.core.Literal):
            both = isinstance(a, jax.extend.core.Literal) and isinstance(b, jax.extend.core.Literal)
            return both and bool(np.array_equal(a.val, b.val, equal_nan=_is_float(a.val)))
        return places.get(a) is b

    for one, other in zip(full.eqns, compact.eqns, strict=True):
        name = one.primitive.name
        if name != other.primitive.name:
            return f"{name} becomes {other.primitive.name}"
        for a, b in zip(one.invars, other.invars, strict=True):
            if not same_atom(a, b):
                return f"a number in {name} changes" if isinstance(a, jax.extend.core.Literal) else f"{name} changes"
        for key in one.params.keys() | other.params.keys():
            difference = _parameter_difference(key, one, other)
            if difference is not None:
                return difference
        places.update(zip(one.outvars, other.outvars, strict=True))
    if not all(same_atom(a, b) for a, b in zip(full.outvars, compact.outvars, strict=True)):
        return "another value is returned"
    return None


def _is_float(number: Any) -> bool:
    return np.issubdtype(np.asarray(number).dtype, np.floating)


def _parameter_difference(key: str, one: Any, other: Any) -> str | None:
    a, b = one.params.get(key), other.params.get(key)
    jaxprs, others = _jaxprs(a), _jaxprs(b)
    if jaxprs or others:
        if len(jaxprs) != len(others):
            return f"{one.primitive.name} changes"
        differences = [first_difference(x, y) for x, y in zip(jaxprs, others, strict=True)]
        return next((d for d in differences if d is not None), None)
    if callable(a) and callable(b):  # rules of differentiation, which are not used
        return None
    if _equal(a, b) or (_is_shape(a, one) and _is_shape(b, other)):
        return None
    return f"{key} of {one.primitive.name} changes"


def _jaxprs(parameter: Any) -> list[Any]:
    parts = parameter if isinstance(parameter, (tuple, list)) else [parameter]
    return [getattr(part, "jaxpr", part) for part in parts if hasattr(part, "jaxpr") or hasattr(part, "eqns")]


def _equal(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except ValueError:  # arrays
        return bool(np.array_equal(a, b))


def _is_shape(parameter: Any, eqn: Any) -> bool:
    """Whether a parameter of an equation is the shape of its result, or where a slice of its trailing axes ends."""
    shape = eqn.outvars[0].aval.shape
    start = eqn.params.get("start_indices")
    return parameter == shape or (start is not None and parameter == tuple(np.add(start, shape)))
