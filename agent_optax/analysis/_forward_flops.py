"""What a forward pass costs, parameter by parameter, read off the jaxpr of the model."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.extend.core
import optax

from agent_optax._jaxpr import scan_sizes
from agent_optax.analysis._conv_products import conv_products

CALLED_JAXPRS = ("jaxpr", "call_jaxpr", "fun_jaxpr")  # jit and remat; custom_jvp_call; custom_vjp_call before JAX 0.7
OPAQUE = ("pallas_call",)  # a kernel, whose jaxpr runs over a grid


class ForwardFlops(NamedTuple):
    """What `forward_flops` counts."""

    per_leaf: Any  # like params, int a leaf: floating-point operations of products with this parameter
    other: int  # of products that no parameter takes part in, such as attention scores

    def total(self) -> int:
        """All of them."""
        return sum(jax.tree.leaves(self.per_leaf)) + self.other


class Source(NamedTuple):
    """Where a value in a jaxpr comes from."""

    is_activation: bool  # whether it depends on the inputs
    shares: tuple[tuple[int, Fraction], ...] = ()  # parameters, by index, and the share of its entries that each makes


ACTIVATION, CONSTANT = Source(True), Source(False)


class Count:
    """Operations counted so far."""

    def __init__(self, num_leaves: int):
        self.per_leaf = [Fraction(0)] * num_leaves
        self.other = Fraction(0)

    def add(self, flops: int, shares: tuple[tuple[int, Fraction], ...]) -> None:
        """Divides operations among parameters; with none they are nobody's."""
        for leaf, share in shares:
            self.per_leaf[leaf] += flops * share
        self.other += flops * (1 - sum(share for _, share in shares))

    def add_count(self, count: Count, times: int = 1) -> None:
        """Adds what a body counted."""
        self.per_leaf = [a + times * b for a, b in zip(self.per_leaf, count.per_leaf, strict=True)]
        self.other += times * count.other

    def total(self) -> Fraction:
        """All of them."""
        return sum(self.per_leaf, self.other)


def forward_flops(apply_fn: Callable[..., Any], params: optax.Params, *inputs: Any) -> ForwardFlops:
    r"""Counts the floating-point operations of matrix products and convolutions in a forward pass.

    .. math::
        \mathrm{FLOPs} = 2 \times \text{multiply-adds}; \qquad
        \text{dense: } 2\, B\, n_{in}\, n_{out}, \qquad
        \text{convolution: } 2\, B\, H'W'\, \frac{k_h k_w c_{in}}{\text{groups}}\, c_{out}

    with :math:`H'W'` the output positions; positions in the padding count, as is usual. Nothing is computed: the
    function is traced to a jaxpr, and each ``dot_general`` and ``conv_general_dilated`` is matched to the parameter
    that flows into it through casts, reshapes, masks, slices, `jax.jit`, `jax.checkpoint`, custom derivatives,
    `jax.lax.scan` and `jax.lax.cond` (the branch that costs most). A parameter that is used twice counts twice. In a
    product of two parameters the second one counts. Elementwise operations, reductions and look-ups in tables are
    free.

    Args:
        apply_fn: ``apply_fn(params, *inputs) -> outputs``, such as ``lambda params, x: model.apply({"params": params},
            x)`` for Flax Linen, or ``lambda params, x: nnx.merge(graphdef, params)(x)`` for NNX.
        params: a tree of arrays, or of `jax.ShapeDtypeStruct`.
        *inputs: example inputs, or their `jax.ShapeDtypeStruct`; a batch of one gives the cost of one sample.

    Returns:
        A `ForwardFlops`.

    Raises:
        ValueError: if a product lies in a `jax.lax.while_loop`, whose number of turns is unknown, or in
            `jax.shard_map`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from agent_optax import analysis
        >>> def apply_fn(params, x):
        ...     return jax.nn.relu(x @ params["hidden"]) @ params["out"]
        >>> params = {"hidden": jnp.zeros((64, 300)), "out": jnp.zeros((300, 10))}
        >>> analysis.forward_flops(apply_fn, params, jnp.zeros((1, 64))).per_leaf
        {'hidden': 38400, 'out': 6000}

    References:
        Evci et al., Rigging the Lottery, ICML 2020, appendix H, for the cost of sparse training in FLOPs.
    """
    leaves, treedef = jax.tree.flatten(params)
    closed = jax.make_jaxpr(apply_fn)(params, *inputs)
    sources = [Source(False, ((i, Fraction(1)),)) for i in range(len(leaves))]
    sources += [ACTIVATION] * (len(closed.jaxpr.invars) - len(leaves))
    sizes = [math.prod(leaf.shape) for leaf in leaves]
    count = Count(len(leaves))
    _walk(closed.jaxpr, sources, sizes, count)
    return ForwardFlops(treedef.unflatten([round(flops) for flops in count.per_leaf]), round(count.other))


def _walk(jaxpr: Any, sources: list[Source], sizes: list[int], count: Count) -> list[Source]:
    """Counts the products in a jaxpr whose inputs come from `sources`; returns where its outputs come from."""
    known: dict[Any, Source] = dict(zip(jaxpr.invars, sources, strict=True))

    def source(atom: Any) -> Source:
        return CONSTANT if isinstance(atom, jax.extend.core.Literal) else known.get(atom, CONSTANT)

    for eqn in jaxpr.eqns:
        operands = [source(atom) for atom in eqn.invars]
        known.update(zip(eqn.outvars, _equation(eqn, operands, sizes, count), strict=True))
    return [source(atom) for atom in jaxpr.outvars]


def _equation(eqn: Any, operands: list[Source], sizes: list[int], count: Count) -> list[Source]:
    name = eqn.primitive.name
    if name in ("dot_general", "conv_general_dilated"):
        products = _dot_products(eqn) if name == "dot_general" else conv_products(eqn)
        count.add(2 * products, _kernel_shares(operands))
        return [ACTIVATION if any(operand.is_activation for operand in operands[:2]) else CONSTANT]
    if name == "scan":
        return _scan(eqn, operands, sizes, count)
    if name == "while":
        return _while(eqn, operands, sizes, count)
    if name == "cond":
        return _cond(eqn, operands, sizes, count)
    called = next((eqn.params[key] for key in CALLED_JAXPRS if key in eqn.params), None)
    if called is not None and name not in OPAQUE:
        inner = Count(len(sizes))
        outputs = _walk(getattr(called, "jaxpr", called), operands, sizes, inner)
        if name == "shard_map" and inner.total():
            raise ValueError(
                "forward_flops cannot count products inside jax.shard_map, whose shapes are those of one device: pass "
                "an apply_fn without it."
            )
        count.add_count(inner)
        return outputs
    if name == "concatenate":
        return [_concatenated(eqn, operands)]
    return [_joined(operands, sizes)] * len(eqn.outvars)


def _kernel_shares(operands: list[Source]) -> tuple[tuple[int, Fraction], ...]:
    """Of a product: the second operand if it is made of parameters, else the first."""
    return operands[1].shares or operands[0].shares


def _joined(operands: list[Source], sizes: list[int]) -> Source:
    """An activation if any operand is; else made of the largest parameter: a mask or a scale does not change whose."""
    if any(operand.is_activation for operand in operands):
        return ACTIVATION
    return max(operands, key=lambda operand: sum(sizes[leaf] for leaf, _ in operand.shares), default=CONSTANT)


def _concatenated(eqn: Any, operands: list[Source]) -> Source:
    """Each parameter makes the share of entries that it brings; what activations bring is theirs."""
    if any(operand.is_activation for operand in operands):
        return ACTIVATION
    shares: dict[int, Fraction] = {}
    for atom, operand in zip(eqn.invars, operands, strict=True):
        for leaf, share in operand.shares:
            part = share * Fraction(atom.aval.size, max(eqn.outvars[0].aval.size, 1))
            shares[leaf] = shares.get(leaf, Fraction(0)) + part
    return Source(False, tuple(shares.items()))


def _dot_products(eqn: Any) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)


def _settled(body: Any, constants: list[Source], carry: list[Source], rest: list[Source], sizes: list[int]) -> Any:
    """Where the carried values of a loop come from, once a further turn changes nothing."""
    while True:
        outputs = _walk(body, [*constants, *carry, *rest], sizes, Count(len(sizes)))[: len(carry)]
        joined = [_joined([old, new], sizes) for old, new in zip(carry, outputs, strict=True)]
        if joined == carry:
            return carry
        carry = joined


def _scan(eqn: Any, operands: list[Source], sizes: list[int], count: Count) -> list[Source]:
    body = eqn.params["jaxpr"].jaxpr
    num_consts, num_carry = scan_sizes(eqn)
    constants, carry = operands[:num_consts], operands[num_consts : num_consts + num_carry]
    slices = operands[num_consts + num_carry :]
    carry = _settled(body, constants, carry, slices, sizes)
    turn = Count(len(sizes))
    outputs = _walk(body, [*constants, *carry, *slices], sizes, turn)
    count.add_count(turn, times=eqn.params["length"])
    return [*carry, *outputs[num_carry:]]


def _while(eqn: Any, operands: list[Source], sizes: list[int], count: Count) -> list[Source]:
    num_cond, num_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    constants = operands[num_cond : num_cond + num_body]
    carry = _settled(eqn.params["body_jaxpr"].jaxpr, constants, operands[num_cond + num_body :], [], sizes)
    turn = Count(len(sizes))
    _walk(eqn.params["body_jaxpr"].jaxpr, [*constants, *carry], sizes, turn)
    _walk(eqn.params["cond_jaxpr"].jaxpr, [*operands[:num_cond], *carry], sizes, turn)
    if turn.total():
        raise ValueError(
            f"forward_flops found a product of {turn.total()} operations in a jax.lax.while_loop, whose number of "
            "turns is unknown: use jax.lax.scan, or jax.lax.fori_loop with bounds that are Python ints."
        )
    return carry


def _cond(eqn: Any, operands: list[Source], sizes: list[int], count: Count) -> list[Source]:
    counts, outputs = [], []
    for branch in eqn.params["branches"]:
        counts.append(Count(len(sizes)))
        outputs.append(_walk(branch.jaxpr, operands[1:], sizes, counts[-1]))
    count.add_count(max(counts, key=Count.total))
    if operands[0].is_activation:
        return [ACTIVATION] * len(eqn.outvars)
    return [_joined(list(column), sizes) for column in zip(*outputs, strict=True)]
