"""AC/DC: sparse and dense phases in turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from agent_optax._validation import check_positive_int
from agent_optax.sparsity._layer import Layer, Target
from agent_optax.sparsity._topology import Topology
from agent_optax.sparsity.topologies._prune import check_scope, check_score, pruned_masks, scores_of
from agent_optax.sparsity.topologies._scores import Score, weight_magnitude


def ac_dc(
    switches: Sequence[int],
    scope: Literal["layer", "global"] = "layer",
    score: Score = weight_magnitude,
) -> ACDC:
    r"""AC/DC: training alternates between all weights and the largest of them, and ends with these.

    Training starts dense. At the first, third, ... of the `switches` the network is compressed to its k weights of
    largest magnitude, and goes on with those alone; at the second, fourth, ... all others are back, from zero:

    .. math::
        \theta \leftarrow T_k(\theta) \quad \text{(compressed)}, \qquad m \leftarrow \mathbb 1 \quad
        \text{(decompressed)}

    where :math:`T_k` keeps the k largest and sets the rest to zero; k is what ``sparsify(..., sparsity=,
    distribution=)`` says. All phases are one compiled program. Every per-parameter state of the inner optimizer starts
    again with a weight that is back, and stays for those that never left.

    Layers change in size, so this needs ``storage="dense"``. With ``masks=`` training starts from those.

    Args:
        switches: the steps, counted from 1, after which the phase changes: an odd number of them, ascending, so that
            the last phase is sparse. The paper trains ResNet-50 for 100 epochs and switches at
            ``[num_batches * epoch for epoch in (*range(10, 80, 5), 85)]``: ten epochs dense, then five sparse and five
            dense, the last dense phase ten, the last sparse one fifteen.
        scope: ``"layer"``: k weights of each layer (default). ``"global"``: as many of all layers together.
        score: by which weights are kept. Default `weight_magnitude` (the paper); any that keeps no statistic.

    Returns:
        A topology for `agent_optax.sparsify`.

    Raises:
        ValueError: if `switches` are not an odd number of ascending steps, or `scope` is unknown.
        TypeError: if `score` is not callable.

    Example:
        >>> import agent_optax, optax
        >>> topology = agent_optax.ac_dc([100, 150, 200, 250, 300])
        >>> tx = agent_optax.sparsify(optax.sgd(0.1, momentum=0.9), topology, sparsity=0.9)

    References:
        Peste et al., AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural Networks, NeurIPS 2021,
        algorithm 1.
    """
    steps = tuple(switches)
    for step in steps:
        check_positive_int("a step in switches", step, "steps are counted from 1")
    if len(steps) % 2 == 0 or list(steps) != sorted(set(steps)):
        raise ValueError(
            f"switches must be an odd number of ascending steps, got {switches!r}: the first and the last make the "
            "network sparse, such as in [100, 150, 200]."
        )
    check_scope(scope)
    check_score(score)
    return ACDC(steps, scope, score)


@dataclasses.dataclass(frozen=True)
class ACDC(Topology):
    """See `ac_dc`."""

    switches: tuple[int, ...]
    scope: str
    score: Score
    initial_sparsity: float | None = 0.0
    keeps_counts = False
    is_layerwise = False

    @property
    def interval(self) -> int:
        """Steps of the first phase."""
        return self.switches[0]

    @property
    def counts_jointly(self) -> bool:
        """Whether active weights of different layers are traded for each other."""
        return self.scope == "global"

    def init(self, params: optax.Params, masks: Any, targets: Sequence[Target]) -> jax.Array:
        """The number of active weights of each layer in a sparse phase: int32 [layers]."""
        del params, masks
        return jnp.asarray([target.num_active for target in targets], jnp.int32)

    def is_due(self, step: jax.Array) -> jax.Array:
        """Where the phase changes."""
        return jnp.isin(step, np.asarray(self.switches))

    def rewire(
        self, layers: Sequence[Layer], state: jax.Array, step: jax.Array, key: jax.Array
    ) -> tuple[list[jax.Array], jax.Array]:
        """The largest, or all."""
        is_sparse = jnp.sum(step >= np.asarray(self.switches)) % 2 == 1
        masks = pruned_masks(layers, scores_of(self.score, layers, key), state, state, True, self.scope)
        return [mask | ~is_sparse for mask in masks], state
