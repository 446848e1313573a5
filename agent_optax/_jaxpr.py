"""What a jaxpr says, whatever the version of JAX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def scan_sizes(eqn: Any) -> tuple[int, int]:
    """How many constants a scan has, and how many arrays it carries.

    Read off the shapes, for what the primitive's parameters are called depends on the version: what is scanned over,
    or stacked up, has an axis more outside of the body.
    """
    body = eqn.params["jaxpr"].jaxpr

    def num_stacked(outer: Sequence[Any], inner: Sequence[Any]) -> int:
        return sum(a.aval.ndim != b.aval.ndim for a, b in zip(outer, inner, strict=True))

    num_carry = len(eqn.outvars) - num_stacked(eqn.outvars, body.outvars)
    return len(eqn.invars) - num_carry - num_stacked(eqn.invars, body.invars), num_carry
