"""Constant fan-in: every output has the same number of active inputs."""

from __future__ import annotations

from agent_optax._validation import check_fraction, check_positive_int
from agent_optax.sparsity.patterns._blocks import Blocks


def fan_in(*, group: int = 1, ablation: float | None = None) -> Blocks:
    r"""Constant fan-in, for ``sparsify(..., pattern=)``: every output of a layer has the same number of active inputs.

    .. math::
        k = \max(1, \mathrm{round}(d\, n_{in}))

    of its :math:`n_{in}` inputs (all that a product sums over, see `Axes`), d being the density of the layer. Such a
    layer can be stored condensed, as arrays [k, outputs] of inputs and weights: `agent_optax.layers` multiplies by
    those. With `group` G, each G consecutive outputs have the same k inputs, as blocks of 1 x G, and are ranked by
    their root mean square; the last group has fewer where G does not divide the outputs. It is exact from the start and
    after every topology update; `gradual_pruning` reaches it at its last.

    With `ablation` :math:`\gamma` (SRigL), outputs die at a topology update that have fewer than
    :math:`\max(1, \lfloor \gamma k \rfloor)` salient inputs: of those that would be active were any mask allowed. What
    they had is shared by the others, whose k becomes the number of active weights over that of outputs left, to the
    nearest whole number; as many outputs stay as it takes to hold all weights. Leave the last layer out, as the
    published code does, for its outputs are classes or tokens: give patterns leaf by leaf,
    ``lambda name: fan_in(ablation=None if "head" in name else 0.3)``.

    Args:
        group: G, consecutive outputs with the same inputs. Default 1.
        ablation: :math:`\gamma`, in (0, 1]. Default None: every output keeps k. The published command for
            ResNet-50 on ImageNet takes 0.3, in code that scales k or all inputs by it. The number of active weights
            changes a little: ``storage="dense"``.

    Returns:
        A pattern for `agent_optax.sparsify`.

    Raises:
        ValueError: if an argument is out of range; from ``init``, with an `ablation` and ``storage="compact"``.

    Example:
        >>> import agent_optax, jax.numpy as jnp, optax
        >>> tx = agent_optax.sparsify(optax.sgd(0.1), agent_optax.rigl(), sparsity=0.75, pattern=agent_optax.fan_in())
        >>> params = jnp.ones((8, 3))
        >>> agent_optax.mask_params(params, tx.init(params)).sum(0).tolist()
        [2.0, 2.0, 2.0]

    References:
        Lasby et al., Dynamic Sparse Training with Structured Sparsity, ICLR 2024 (SRigL).
    """
    check_positive_int("group", group, "it counts consecutive outputs that have the same inputs")
    if ablation is not None:
        check_fraction("ablation", ablation, "it is the share of an output's inputs that must be salient, such as 0.3")
        if ablation == 0:
            raise ValueError("ablation must be positive, got 0: None ablates nothing.")
    return Blocks((1, group), balanced=True, ablation=ablation)
