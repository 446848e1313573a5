"""Reading off a jaxpr whether an optimizer treats every entry of a parameter by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core
import numpy as np

# Primitives whose outputs have the shape of their operands and depend on each entry alone.
ENTRYWISE = frozenset(
    "abs acos acosh add add_any and asin asinh atan atan2 atanh bitcast_convert_type cbrt ceil clamp "
    "convert_element_type copy copy_p cos cosh div eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow "
    "is_finite le log log1p logistic lt max min mul ne neg nextafter not optimization_barrier or pow "
    "reduce_precision rem reshard round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin "
    "sinh sqrt square stop_gradient sub tan tanh xor sharding_constraint".split()
)
# Primitives that may add, drop or index axes in front of those of the parameter.
LEADING = frozenset(
    "broadcast_in_dim concatenate dynamic_slice dynamic_update_slice expand_dims reshape slice squeeze".split()
)
REDUCTIONS = frozenset("reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or".split())

Shape = tuple[int, ...]


class EntryMixing(NamedTuple):
    """How an optimizer mixes the entries of its parameters."""

    reduces: bool  # whether sums or extrema over entries enter, as in a global norm
    structured: tuple[str, ...]  # what else it does to whole arrays, such as matrix products

    def is_entrywise(self) -> bool:
        """Whether the update of an entry depends on nothing but that entry and scalars."""
        return not self.reduces and not self.structured


def entry_mixing(jaxpr: Any, leaf_shapes: Sequence[Shape | None]) -> EntryMixing:
    """Follows arrays that belong to parameters through `jaxpr`.

    `leaf_shapes` holds, for each input, the shape of the parameter it belongs to, or None.
    """
    found: set[str] = set()
    _follow(jaxpr, leaf_shapes, found)
    return EntryMixing(reduces="reduces" in found, structured=tuple(sorted(found - {"reduces"})))


def _follow(jaxpr: Any, shapes: Sequence[Shape | None], found: set[str]) -> list[Shape | None]:
    """Returns the parameter shape of each output; adds what it meets to `found`."""
    belongs: dict[Any, Shape] = {v: s for v, s in zip(jaxpr.invars, shapes, strict=True) if s is not None}
    sums: dict[Any, int] = {}  # scalars that are reductions over so many entries

    def shape_of(atom: Any) -> Shape | None:
        return None if isinstance(atom, jax.extend.core.Literal) else belongs.get(atom)

    for eqn in jaxpr.eqns:
        operands = [shape_of(atom) for atom in eqn.invars]
        leaf = next((s for s in operands if s is not None), None)
        if leaf is None:
            if eqn.primitive.name in ("div", "mul") and not isinstance(eqn.invars[0], jax.extend.core.Literal):
                _find_mean(eqn, sums, found)
            for atom in eqn.invars[:1]:
                if not isinstance(atom, jax.extend.core.Literal) and atom in sums:
                    sums.update({out: sums[atom] for out in eqn.outvars if out.aval.size == 1})
            continue
        outputs = _step(eqn, operands, leaf, found, sums)
        belongs.update({v: s for v, s in zip(eqn.outvars, outputs, strict=True) if s is not None})
    return [shape_of(atom) for atom in jaxpr.outvars]


def _step(
    eqn: Any, operands: list[Shape | None], leaf: Shape, found: set[str], sums: dict[Any, int]
) -> list[Shape | None]:
    name = eqn.primitive.name
    inner = _called(eqn)
    if inner is not None:
        return _follow(inner, operands, found)
    if name == "cond":
        branches = [_follow(branch.jaxpr, operands[1:], found) for branch in eqn.params["branches"]]
        return [next((s for s in column if s is not None), None) for column in zip(*branches, strict=True)]
    if name == "while":
        num_cond, num_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        constants, carry = operands[num_cond : num_cond + num_body], operands[num_cond + num_body :]
        return _fixed_point(eqn.params["body_jaxpr"].jaxpr, constants, carry, found)
    if name in REDUCTIONS:
        rank = eqn.invars[0].aval.ndim
        own = set(range(rank - len(leaf), rank))
        axes = set(eqn.params["axes"])
        if not axes & own:
            return [leaf]
        if axes >= own:
            found.add("reduces")
            sums.update({out: int(np.prod(leaf, dtype=int)) for out in eqn.outvars if out.aval.size == 1})
            return [None] * len(eqn.outvars)
        found.add(f"{name} over some axes of a parameter")
        return [None] * len(eqn.outvars)
    same_leaf = all(s in (None, leaf) for s in operands)
    keeps_shape = all(out.aval.shape[out.aval.ndim - len(leaf) :] == leaf for out in eqn.outvars)
    if name in ENTRYWISE and same_leaf and keeps_shape:
        return [leaf] * len(eqn.outvars)
    if name in LEADING and same_leaf and keeps_shape and _only_leading(eqn, leaf):
        return [leaf] * len(eqn.outvars)
    found.add(name)
    return [leaf if out.aval.shape[out.aval.ndim - len(leaf) :] == leaf else None for out in eqn.outvars]


def _called(eqn: Any) -> Any:
    """The jaxpr of a call such as jit, or None."""
    if eqn.primitive.name in ("scan", "while", "cond"):
        return None
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if key in eqn.params:
            return getattr(eqn.params[key], "jaxpr", eqn.params[key])
    return None


def _fixed_point(
    body: Any, constants: list[Shape | None], carry: list[Shape | None], found: set[str]
) -> list[Shape | None]:
    while True:
        outputs = _follow(body, [*constants, *carry], found)
        merged = [old if old is not None else new for old, new in zip(carry, outputs, strict=True)]
        if merged == carry:
            return carry
        carry = merged


def _only_leading(eqn: Any, leaf: Shape) -> bool:
    """Whether an indexing primitive leaves the trailing axes of the parameter whole."""
    shape = eqn.invars[0].aval.shape
    if eqn.primitive.name == "concatenate":
        return eqn.params["dimension"] < len(shape) - len(leaf)
    return shape[len(shape) - len(leaf) :] == leaf


def _find_mean(eqn: Any, sums: dict[Any, int], found: set[str]) -> None:
    """A sum over entries divided by their number reads the shape of the parameter."""
    total, factor = eqn.invars
    if total not in sums or not isinstance(factor, jax.extend.core.Literal):
        return
    number = float(factor.val) if eqn.primitive.name == "div" else 1 / float(factor.val)
    if sums[total] > 1 and abs(number / sums[total] - 1) < 1e-6:
        found.add("a mean over the entries of a parameter")
