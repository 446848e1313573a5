"""Erdős-Rényi densities are those of the authors' published code."""

import math

import numpy as np
import pytest

import agent_optax

NETWORKS = ("mlp", "vgg_c", "resnet50")


def flax_shapes(table):
    """Rows (out, in) or (out, in, height, width), padded with -1, as (in, out) or (height, width, in, out)."""
    shapes = [tuple(int(n) for n in row if n > 0) for row in table]
    return [(*shape[2:], shape[1], shape[0]) for shape in shapes]


@pytest.mark.parametrize("network", NETWORKS)
def test_erk(golden, network):
    numbers = golden("erk_itop")
    shapes = flax_shapes(numbers[f"{network}_shapes"])
    for density, expected in zip(numbers["targets"], numbers[f"{network}_density"], strict=True):
        np.testing.assert_allclose(agent_optax.erk(shapes, 1 - density), expected, rtol=1e-12)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", ["erk", "er"])
def test_densities_from_truncated_counts(golden, network, name):
    r"""A-RigL cuts each layer's counts to whole numbers.

    With numerators :math:`\sum_{sparse} \lfloor d n_l \rfloor - \sum_{dense} \lfloor (1-d) n_l \rfloor` its epsilon is
    the exact one plus t / sum(raw n), where t lies between minus the number of sparse layers and the number of dense
    ones: each cut takes less than 1. So the densities of sparse layers are the exact ones plus raw t / sum(raw n).
    """
    numbers = golden("erk_rigl")
    shapes = flax_shapes(numbers[f"{network}_shapes"])
    distribution = {"erk": agent_optax.erk, "er": agent_optax.erdos_renyi}[name]
    units = shapes if name == "erk" else [shape[-2:] for shape in shapes]
    raw = np.array([sum(unit) / math.prod(unit) for unit in units])
    sizes = np.array([math.prod(shape) for shape in shapes])
    for density, expected in zip(numbers["targets"], numbers[f"{network}_{name}"], strict=True):
        densities = np.array(distribution(shapes, 1 - density))
        dense = densities == 1
        np.testing.assert_array_equal(dense, expected == 1)
        cut = (expected - densities)[~dense] * np.sum((raw * sizes)[~dense]) / raw[~dense]
        rounding = 1e-12 * sizes.sum()
        assert np.all(cut > -np.sum(~dense) - rounding) and np.all(cut < np.sum(dense) + rounding)
        np.testing.assert_allclose(cut, cut[0], atol=rounding)  # one epsilon for all
