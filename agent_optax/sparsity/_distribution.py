"""How a global sparsity is shared among layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from agent_optax._validation import check_fraction

Shape = tuple[int, ...]
Distribution = Callable[[Sequence[Shape], float], list[float]]


def uniform(shapes: Sequence[Shape], sparsity: float) -> list[float]:
    r"""Every layer has the same density.

    .. math::
        d_l = 1 - s

    Args:
        shapes: of the L layers.
        sparsity: s, the share of inactive weights, in [0, 1).

    Returns:
        L densities.

    Raises:
        ValueError: if `sparsity` is outside [0, 1).

    Example:
        >>> import agent_optax
        >>> agent_optax.uniform([(784, 300), (300, 10)], 0.75)
        [0.25, 0.25]
    """
    _check(sparsity)
    return [1.0 - sparsity] * len(shapes)


def erdos_renyi(shapes: Sequence[Shape], sparsity: float) -> list[float]:
    r"""Erdős-Rényi: the density of a layer falls with its number of input and output units.

    .. math::
        d_l = \min\left(1, \epsilon\, \frac{n_{in} + n_{out}}{n_{in}\, n_{out}}\right)

    with :math:`\epsilon` such that the total density is 1 - s. The spatial extent of a convolution kernel does not
    enter; the last two axes of a shape are its inputs and outputs (Flax layout).

    Args:
        shapes: of the L layers, each of two axes or more.
        sparsity: s, the share of inactive weights over all layers, in [0, 1).

    Returns:
        L densities in (0, 1].

    Raises:
        ValueError: if `sparsity` is outside [0, 1) or a shape has fewer than two axes.

    Example:
        >>> import agent_optax
        >>> [round(d, 4) for d in agent_optax.erdos_renyi([(784, 300), (300, 10)], 0.9)]
        [0.0885, 1.0]

    References:
        Mocanu et al., Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity inspired by
        Network Science, Nature Communications 2018.
    """
    return _scaled_densities(shapes, sparsity, [shape[-2:] for shape in shapes])


def erk(shapes: Sequence[Shape], sparsity: float) -> list[float]:
    r"""Erdős-Rényi-Kernel: like `erdos_renyi`, with the kernel's spatial axes included.

    .. math::
        d_l = \min\left(1, \epsilon\, \frac{\sum_j n_{l,j}}{\prod_j n_{l,j}}\right)

    over the axes j of layer l, with :math:`\epsilon` such that the total density is 1 - s. While a density would
    exceed 1, the layer (or the layers tied with it) becomes dense and :math:`\epsilon` is computed anew.

    Args:
        shapes: of the L layers, each of two axes or more.
        sparsity: s, the share of inactive weights over all layers, in [0, 1).

    Returns:
        L densities in (0, 1].

    Raises:
        ValueError: if `sparsity` is outside [0, 1) or a shape has fewer than two axes.

    Example:
        >>> import agent_optax
        >>> [round(d, 4) for d in agent_optax.erk([(3, 3, 16, 32), (3, 3, 32, 64), (1024, 10)], 0.9)]
        [0.0328, 0.0155, 0.2824]

    References:
        Evci et al., Rigging the Lottery: Making All Tickets Winners, ICML 2020.
    """
    return _scaled_densities(shapes, sparsity, shapes)


def _scaled_densities(shapes: Sequence[Shape], sparsity: float, units: Sequence[Shape]) -> list[float]:
    """Densities in proportion to sum(units)/prod(units), the largest capped at 1."""
    _check(sparsity)
    for shape in shapes:
        if len(shape) < 2:
            raise ValueError(
                f"an Erdős-Rényi density needs a layer with inputs and outputs, got the shape {tuple(shape)}. "
                "Exclude this leaf with where=, or use distribution=agent_optax.uniform."
            )
    sizes = [math.prod(shape) for shape in shapes]
    raw = [sum(unit) / math.prod(unit) for unit in units]
    dense: set[int] = set()
    while len(dense) < len(shapes):
        rest = [i for i in range(len(shapes)) if i not in dense]
        wanted = (1 - sparsity) * sum(sizes[i] for i in rest) - sparsity * sum(sizes[i] for i in dense)
        epsilon = wanted / sum(raw[i] * sizes[i] for i in rest)
        largest = max(raw[i] for i in rest)
        if epsilon * largest <= 1:
            return [1.0 if i in dense else epsilon * raw[i] for i in range(len(shapes))]
        dense |= {i for i in rest if raw[i] == largest}
    return [1.0] * len(shapes)


def _check(sparsity: float) -> None:
    check_fraction("sparsity", sparsity, "it is the share of inactive weights, such as 0.9", below_one=True)
