"""Following the entries of parameters through the jaxpr of an optimizer.

Nothing is evaluated here: the optimizer runs as it is. What is read off decides which states belong to single weights,
whether a state stays at its initial value where a weight is inactive, and whether the optimizer can run on the active
entries alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core
import numpy as np

from agent_optax._jaxpr import scan_sizes
from agent_optax.sparsity.inner._resting import rest_value

# Primitives whose outputs have the shape of their operands and depend on each entry alone.
ENTRYWISE = frozenset(
    "abs acos acosh add add_any and asin asinh atan atan2 atanh bitcast_convert_type cbrt ceil clamp "
    "convert_element_type copy copy_p cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt "
    "imag integer_pow is_finite le le_to lgamma log log1p logistic lt lt_to max min mul name ne neg nextafter not or "
    "pow pvary real reduce_precision rem reshard round rsqrt select_n shift_left shift_right_arithmetic "
    "shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor sharding_constraint".split()
)
# Primitives that treat each operand by itself, entry by entry.
EACH_BY_ITSELF = frozenset(["optimization_barrier", "device_put"])
# Primitives that may add, drop or index axes in front of those of the parameter, or lay its entries out in a row.
LEADING = frozenset(
    "broadcast_in_dim concatenate dynamic_slice dynamic_update_slice expand_dims reshape slice squeeze".split()
)
NEUTRAL = {"reduce_sum": 0, "reduce_and": True, "reduce_or": False}  # reductions, and what adds nothing to them
# Programs of their own, which cannot be looked into: outputs shaped like a parameter are taken for its entries.
OPAQUE = frozenset("pallas_call custom_call ffi_call pure_callback io_callback tpu_custom_call".split())

Shape = tuple[int, ...]


class Known(NamedTuple):
    """What is known about a value."""

    leaf: int | None = None  # the parameter whose entries it holds, each in its place on the trailing axes
    layout: Shape = ()  # those axes: the shape of the parameter, or its size where they lie in a row
    is_mixed: bool = False  # whether an entry depends on other entries, other than through scalars
    is_uniform: bool = False  # whether all entries are equal
    is_joined: bool = False  # whether it holds the entries of several parameters, one after the other
    depends: bool = False  # whether it depends on a parameter, its gradient or its state
    rest: Any = None  # the value at an inactive entry, or of all entries if uniform; None if not known


class Findings(NamedTuple):
    """What an optimizer does other than to single entries; each a set of words for an error message."""

    reductions: set[str]  # sums over all entries, to which inactive ones add nothing
    structure: set[str]  # what makes an entry depend on certain others
    positions: set[str]  # what makes an entry depend on where it lies


def follow(jaxpr: Any, inputs: Sequence[Known], shapes: Sequence[Shape], found: Findings) -> list[Known]:
    """What is known about the outputs of `jaxpr`, given its inputs and the shapes of the parameters."""
    known = dict(zip(jaxpr.invars, inputs, strict=True))
    known.update({v: _constant(v) for v in jaxpr.constvars})

    def read(atom: Any) -> Known:
        return _literal(atom) if isinstance(atom, jax.extend.core.Literal) else known[atom]

    for eqn in jaxpr.eqns:
        outputs = _apply(eqn, [read(atom) for atom in eqn.invars], shapes, found)
        known.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _literal(atom: Any) -> Known:
    return Known(is_uniform=True, rest=np.asarray(atom.val)) if np.ndim(atom.val) == 0 else Known()


def _constant(v: Any) -> Known:
    return Known(is_uniform=math.prod(v.aval.shape) == 1)


def _apply(eqn: Any, operands: list[Known], shapes: Sequence[Shape], found: Findings) -> list[Known]:
    name = eqn.primitive.name
    called = _called(eqn)
    if called is not None:
        return follow(called, operands, shapes, found)
    if name == "cond":
        return _cond(eqn, operands, shapes, found)
    if name == "while":
        return _while(eqn, operands, shapes, found)
    if name == "scan":
        return _scan(eqn, operands, shapes, found)
    if name in EACH_BY_ITSELF:
        return operands
    if not any(o.depends for o in operands):
        return [_independent(eqn, operands, out) for out in eqn.outvars]
    if name in ENTRYWISE:
        return [_entrywise(eqn, operands, found)] * len(eqn.outvars)
    if name in NEUTRAL:
        return [_reduced(eqn, operands[0], found)]
    if name == "dot_general":
        return [_dot(eqn, operands, found)]
    if name in LEADING:
        return [_leading(eqn, operands, shapes, found)]
    return [_other(eqn, operands, out, shapes, found) for out in eqn.outvars]


def _called(eqn: Any) -> Any:
    """The jaxpr of a call such as jit, or None."""
    if eqn.primitive.name in ("scan", "while", "cond", "shard_map", *OPAQUE):
        return None
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if key in eqn.params:
            return getattr(eqn.params[key], "jaxpr", eqn.params[key])
    return None


def _independent(eqn: Any, operands: list[Known], out: Any) -> Known:
    """A value that depends on no parameter."""
    name = eqn.primitive.name
    is_uniform = math.prod(out.aval.shape) == 1 or (
        name in ENTRYWISE | {"broadcast_in_dim", "reshape"} and all(o.is_uniform for o in operands)
    )
    return Known(is_uniform=is_uniform, rest=rest_value(eqn, operands) if is_uniform else None)


def _entrywise(eqn: Any, operands: list[Known], found: Findings) -> Known:
    held = {(o.leaf, o.layout) for o in operands if o.leaf is not None}
    is_mixed = any(o.is_mixed for o in operands)
    if not held:
        is_uniform, is_joined = all(o.is_uniform for o in operands), any(o.is_joined for o in operands)
        return Known(is_mixed=is_mixed, is_uniform=is_uniform, is_joined=is_joined, depends=True)
    leaf, layout = min(held)
    if len(held) > 1:
        found.structure.add(f"{eqn.primitive.name} of two parameters")
        return Known(leaf, layout, is_mixed=True, depends=True)
    if any(o.leaf is None and not o.is_uniform and not o.is_mixed for o in operands):
        found.positions.add("an array of numbers that differ from entry to entry")
    return Known(leaf, layout, is_mixed, depends=True, rest=rest_value(eqn, operands))


def _reduced(eqn: Any, operand: Known, found: Findings) -> Known:
    name, aval = eqn.primitive.name, eqn.invars[0].aval
    is_scalar = math.prod(eqn.outvars[0].aval.shape) == 1
    if operand.leaf is None:
        return Known(is_mixed=operand.is_mixed and not is_scalar, is_uniform=is_scalar, depends=True)
    own = set(range(aval.ndim - len(operand.layout), aval.ndim))
    axes = set(eqn.params["axes"])
    if not axes & own:  # over axes in front
        return operand._replace(rest=operand.rest if operand.rest is not None and operand.rest == 0 else None)
    if not axes >= own:
        found.structure.add(f"{name} over some axes of a parameter")
        return Known(is_mixed=True, depends=True)
    if operand.rest is None or bool(operand.rest) != bool(NEUTRAL[name]):
        found.structure.add(f"{name} to which inactive weights contribute")
    found.reductions.add(name)
    return Known(is_uniform=is_scalar, depends=True)


def _dot(eqn: Any, operands: list[Known], found: Findings) -> Known:
    """An inner product of all entries is a sum; any other product mixes them."""
    (contracted, _), batch = eqn.params["dimension_numbers"]
    held = {(o.leaf, o.layout) for o in operands if o.leaf is not None}
    is_inner = len(held) == 1 and not any(batch) and not eqn.outvars[0].aval.shape
    is_inner = is_inner and all(o.leaf is not None and not o.is_mixed for o in operands)
    if is_inner and len(contracted) == len(min(held)[1]) and any(o.rest is not None and o.rest == 0 for o in operands):
        found.reductions.add("dot_general")
        return Known(is_uniform=True, depends=True)
    return _other(eqn, operands, eqn.outvars[0], [], found)


def _leading(eqn: Any, operands: list[Known], shapes: Sequence[Shape], found: Findings) -> Known:
    name, out = eqn.primitive.name, eqn.outvars[0].aval.shape
    arrays = operands[:2] if name == "dynamic_update_slice" else operands if name == "concatenate" else operands[:1]
    held = {(o.leaf, o.layout) for o in arrays if o.leaf is not None}
    is_mixed, is_uniform = any(o.is_mixed for o in arrays), all(o.is_uniform for o in arrays)
    if not held:
        is_uniform = (is_uniform and name != "concatenate") or math.prod(out) == 1
        is_joined = any(o.is_joined for o in arrays) and name == "concatenate"
        return Known(is_mixed=is_mixed, is_uniform=is_uniform, is_joined=is_joined, depends=True)
    (leaf, layout) = min(held)
    assert leaf is not None
    others_fit = all(o.leaf is not None or o.is_uniform for o in arrays)
    if len(held) == 1 and others_fit:
        rests = {None if o.rest is None else o.rest.item() for o in arrays}
        rest = arrays[0].rest if len(rests) == 1 else None
        if name == "reshape":
            for new_layout in (shapes[leaf], (math.prod(shapes[leaf]),)):
                if _reshapes_in_place(eqn.invars[0].aval.shape, layout, out, new_layout):
                    return Known(leaf, new_layout, is_mixed, depends=True, rest=rest)
        elif _only_leading(eqn, layout):
            return Known(leaf, layout, is_mixed, depends=True, rest=rest)
    found.structure.add(name)
    is_joined = (
        name == "concatenate" and len(out) == 1 and all(len(o.layout) == 1 for o in arrays if o.leaf is not None)
    )
    return Known(is_mixed=True, is_joined=is_joined, depends=True)


def _reshapes_in_place(shape: Shape, layout: Shape, out: Shape, new_layout: Shape) -> bool:
    """Whether a reshape keeps the entries of a parameter together, whatever it does to the axes in front."""
    is_trailing = out[len(out) - len(new_layout) :] == new_layout and len(out) >= len(new_layout)
    in_front = math.prod(shape[: len(shape) - len(layout)])
    return is_trailing and math.prod(out[: len(out) - len(new_layout)]) == in_front


def _only_leading(eqn: Any, layout: Shape) -> bool:
    """Whether an indexing primitive leaves the trailing axes of a parameter whole."""
    name, out = eqn.primitive.name, eqn.outvars[0].aval.shape
    shape = eqn.invars[0].aval.shape
    if out[len(out) - len(layout) :] != layout or len(out) < len(layout):
        return False
    if name == "concatenate":
        return eqn.params["dimension"] < len(shape) - len(layout)
    if name == "broadcast_in_dim":
        return eqn.params["broadcast_dimensions"] == tuple(range(len(out) - len(shape), len(out)))
    return shape[len(shape) - len(layout) :] == layout


def _other(eqn: Any, operands: list[Known], out: Any, shapes: Sequence[Shape], found: Findings) -> Known:
    name, shape = eqn.primitive.name, out.aval.shape
    held = [o for o in operands if o.leaf is not None]
    is_mixed = bool(held) or any(o.is_mixed for o in operands)
    if is_mixed:
        found.structure.add(name)
    for o in held if name in OPAQUE else []:
        if shape[len(shape) - len(o.layout) :] == o.layout:
            return Known(o.leaf, o.layout, depends=True)
    is_scalar = math.prod(shape) == 1
    return Known(is_mixed=is_mixed and not is_scalar, is_uniform=is_scalar, depends=True)


def _join(a: Known, b: Known) -> Known:
    """What is known about a value that is one or the other."""
    if b.leaf is not None and (a.leaf is None and a.is_uniform):
        a, b = b, a
    same_place = (a.leaf, a.layout) == (b.leaf, b.layout) or (b.leaf is None and b.is_uniform)
    same_rest = a.rest is not None and b.rest is not None and a.rest == b.rest
    return Known(
        leaf=a.leaf if same_place else None,
        layout=a.layout if same_place else (),
        is_mixed=a.is_mixed or b.is_mixed or not same_place,
        is_uniform=a.is_uniform and b.is_uniform,
        is_joined=a.is_joined or b.is_joined,
        depends=a.depends or b.depends,
        rest=a.rest if same_rest else None,
    )


def _cond(eqn: Any, operands: list[Known], shapes: Sequence[Shape], found: Findings) -> list[Known]:
    index, *arguments = operands
    branches = [follow(branch.jaxpr, arguments, shapes, found) for branch in eqn.params["branches"]]
    outputs = branches[0]
    for branch in branches[1:]:
        outputs = [_join(a, b) for a, b in zip(outputs, branch, strict=True)]
    return [out._replace(depends=out.depends or index.depends) for out in outputs]


def _while(eqn: Any, operands: list[Known], shapes: Sequence[Shape], found: Findings) -> list[Known]:
    num_cond, num_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond_consts, body_consts = operands[:num_cond], operands[num_cond : num_cond + num_body]
    body = eqn.params["body_jaxpr"].jaxpr
    carry = _fixed_point(body, body_consts, operands[num_cond + num_body :], [], shapes, found)[0]
    (predicate,) = follow(eqn.params["cond_jaxpr"].jaxpr, [*cond_consts, *carry], shapes, found)
    return [out._replace(depends=out.depends or predicate.depends) for out in carry]


def _scan(eqn: Any, operands: list[Known], shapes: Sequence[Shape], found: Findings) -> list[Known]:
    num_consts, num_carry = scan_sizes(eqn)
    consts, carry, xs = (
        operands[:num_consts],
        operands[num_consts : num_consts + num_carry],
        operands[num_consts + num_carry :],
    )
    scanned = []
    for o, atom in zip(xs, eqn.invars[num_consts + num_carry :], strict=True):
        if o.leaf is not None and atom.aval.ndim == len(o.layout):
            found.structure.add("scan over an axis of a parameter")
            o = Known(is_mixed=True, depends=True)
        scanned.append(o)
    carry, ys = _fixed_point(eqn.params["jaxpr"].jaxpr, consts, carry, scanned, shapes, found)
    return [*carry, *ys]


def _fixed_point(
    body: Any,
    consts: list[Known],
    carry: list[Known],
    scanned: list[Known],
    shapes: Sequence[Shape],
    found: Findings,
) -> tuple[list[Known], list[Known]]:
    """What is known about the carry of a loop after any number of iterations, and about its further outputs."""
    while True:
        outputs = follow(body, [*consts, *carry, *scanned], shapes, found)
        new = [_join(old, out) for old, out in zip(carry, outputs, strict=False)]
        if new == carry:
            return carry, outputs[len(carry) :]
        carry = new
