"""The axes of leaves by the conventions of Flax, Haiku and Equinox, told by names, biases and neighbors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from agent_optax.sparsity._axes import Axes, Shape

AxesChoice = Callable[[str, Shape], Axes | None] | None
Path = tuple[str, ...]  # the components of a name, in lower case

KERNEL = ("kernel", "w", "weight")  # the name of the array of a layer: the layer itself is one component up
OUTPUTS_FIRST = ("weight", "weight_ih", "weight_hh")  # Equinox, as PyTorch: [outputs, inputs, *spatial]
BIAS = ("bias", "b")
# Modules below which every array has an axis of layers, unless a number follows: nn.scan and nn.vmap name modules
# Scan... and Vmap..., Haiku's layer_stack says so, and people call what nnx.vmap stacks layers, blocks, experts.
STACK = re.compile(
    r"(scan|vmap)\w*|\w*layer_stack\w*|(\w+_)?(layers|blocks|stack|stacked|experts|ensemble|critics|members)"
)
ATTENTION_IN = ("query", "key", "value", *(f"{x}{end}" for x in "qkv" for end in ("", "_proj")), "wq", "wk", "wv")
ATTENTION_OUT = ("out", "output", "o", "out_proj", "o_proj", "wo")


class LeafAxes(NamedTuple):
    """The axes of a leaf."""

    axes: Axes
    is_known: bool  # False: a guess, for a leaf of three axes of which nothing tells the meaning


def axes_of_leaves(
    choice: AxesChoice, names: Sequence[str], shapes: Sequence[Shape], indices: Sequence[int]
) -> list[LeafAxes]:
    """The axes of the leaves of these indices in a tree: what `choice` gives for name and shape, or else the default.

    Raises TypeError if it gives anything but an `Axes` or None.
    """
    paths = [tuple(name.lower().split("/")) for name in names]
    tree = dict(zip(paths, shapes, strict=True))
    leaves = []
    for i in indices:
        chosen = None if choice is None else choice(names[i], shapes[i])
        if chosen is None:
            leaves.append(_default_axes(paths[i], shapes[i], tree))
        elif isinstance(chosen, Axes):
            leaves.append(LeafAxes(chosen.of_leaf(names[i], shapes[i]), is_known=True))
        else:
            raise TypeError(
                "axes= must give an agent_optax.Axes, or None for the default, for each leaf to prune; for "
                f"{names[i]} it gave {chosen!r}."
            )
    return leaves


def check_axes(choice: AxesChoice) -> None:
    """Raises TypeError unless it is a function, or None."""
    if choice is not None and not callable(choice):
        raise TypeError(
            "axes must be a function of the name and shape of a leaf, such as lambda name, shape: "
            f"agent_optax.Axes(stack=0, inputs=1, outputs=2), got {choice!r}."
        )


def _default_axes(path: Path, shape: Shape, tree: Mapping[Path, Shape]) -> LeafAxes:
    """For a leaf of more than two axes, what its bias tells comes first, then what its name does."""
    if len(shape) < 2:
        return LeafAxes(Axes(outputs=tuple(range(len(shape)))), is_known=True)
    stack = _stack_by_bias(path, shape, tree)
    if stack is None:
        stack = _stack_by_name(path, shape, tree)
    rest = tuple(axis for axis in range(len(shape)) if axis not in stack)
    if len(rest) == 1:  # a vector for each layer
        return LeafAxes(Axes(stack=stack, outputs=rest), is_known=True)
    bias = _bias(path, tree)
    if path[-1] in OUTPUTS_FIRST:
        is_known = len(rest) != 3 or "conv" in _module(path) or bias is not None
        return LeafAxes(Axes(stack, spatial=rest[2:], inputs=rest[1], outputs=rest[0]), is_known)
    if len(rest) == 2:
        return LeafAxes(Axes(stack, inputs=rest[0], outputs=rest[1]), is_known=True)
    if len(rest) == 3 and _is_attention(path, stack, tree):
        num_inputs = 2 if _module(path) in ATTENTION_OUT else 1
        return LeafAxes(Axes(stack, inputs=rest[:num_inputs], outputs=rest[num_inputs:]), is_known=True)
    num_outputs = 0 if bias is None else len(bias) - len(stack)
    if bias is not None and num_outputs == 2 and tuple(shape[axis] for axis in rest[-2:]) == bias[-2:]:
        return LeafAxes(Axes(stack, inputs=rest[:-2], outputs=rest[-2:]), is_known=True)  # DenseGeneral to two axes
    is_known = len(rest) != 3 or "conv" in _module(path) or num_outputs == 1
    return LeafAxes(Axes(stack, spatial=rest[:-2], inputs=rest[-2], outputs=rest[-1]), is_known)


def _module(path: Path) -> str:
    """The layer that a leaf belongs to: the component above kernel, or the leaf itself."""
    *above, name = path
    return above[-1] if above and name in KERNEL else name


def _bias(path: Path, tree: Mapping[Path, Shape]) -> Shape | None:
    beside = [(*path[:-1], name) for name in BIAS if path[-1] in KERNEL]
    return next((tree[bias] for bias in beside if bias in tree), None)


def _stack_by_bias(path: Path, shape: Shape, tree: Mapping[Path, Shape]) -> tuple[int, ...] | None:
    """A bias has the axes of the stack and those of the outputs; None where there is none, or it fits both ways."""
    bias = _bias(path, tree)
    if bias is None or len(shape) == 2:
        return None
    if path[-1] in OUTPUTS_FIRST:
        return (0,) if len(bias) == 2 and bias == shape[:2] and bias[1] > 1 else ()
    is_whole = shape[-len(bias) :] == bias
    is_stacked = len(bias) > 1 and shape[0] == bias[0] and shape[1 - len(bias) :] == bias[1:]
    if is_whole == is_stacked:
        return None
    return (0,) if is_stacked else ()


def _stack_by_name(path: Path, shape: Shape, tree: Mapping[Path, Shape]) -> tuple[int, ...]:
    """An axis for each component that names a stack, if all arrays below it have one of the same size."""
    found: list[int] = []
    for depth, component in enumerate(path):
        is_numbered = depth + 1 < len(path) and path[depth + 1].isdigit()
        if len(shape) - len(found) < 3 or is_numbered or not STACK.fullmatch(component):
            continue
        below = [other for at, other in tree.items() if at[: depth + 1] == path[: depth + 1]]
        free = [axis for axis in range(len(shape)) if axis not in found][:2]  # the first, or the second as in MaxText
        same = [axis for axis in free if {other[axis : axis + 1] for other in below} == {shape[axis : axis + 1]}]
        found += same[:1]
    return tuple(found)


def _is_attention(path: Path, stack: tuple[int, ...], tree: Mapping[Path, Shape]) -> bool:
    """Whether beside the leaf are a query [in, heads, size] and an output projection [heads, size, out] that fit."""
    end = 2 if path[-1] in KERNEL and len(path) > 1 else 1
    if _module(path) not in ATTENTION_IN + ATTENTION_OUT:
        return False

    def beside(names: Sequence[str]) -> list[Shape]:
        shapes = [tree.get((*path[:-end], name, *path[len(path) - end + 1 :])) for name in names]
        kept = [[n for axis, n in enumerate(shape) if axis not in stack] for shape in shapes if shape is not None]
        return [tuple(shape) for shape in kept if len(shape) == 3]

    return any(into[1:] == out[:2] for into in beside(ATTENTION_IN) for out in beside(ATTENTION_OUT))
