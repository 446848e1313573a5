"""Straight-through estimators: masks of weights that all positions keep."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from agent_optax._tree import is_masked
from agent_optax._validation import check_number, is_concrete_number
from agent_optax.sparsity._layer import Layer, Target
from agent_optax.sparsity._pruned_leaf import PrunedLeaf
from agent_optax.sparsity._rewiring import rewired_masks, when
from agent_optax.sparsity._running_score import RunningScore
from agent_optax.sparsity._sparse_optimizer import SparseOptimizer
from agent_optax.sparsity._start import Start
from agent_optax.sparsity._state import SparsifyState
from agent_optax.sparsity.storages._latent import LatentStep, LatentTopology, Reconnected
from agent_optax.sparsity.topologies._prune import check_scope, check_score, pruned_masks, scores_of
from agent_optax.sparsity.topologies._scores import Score, weight_magnitude
from agent_optax.sparsity.topologies._update_times import UpdateTimes, update_times


def straight_through(
    score: Score = weight_magnitude,
    *,
    update_every: int = 1,
    start: int | None = None,
    stop: int | None = None,
    decay: float = 0.0,
    scope: Literal["layer", "global"] = "layer",
) -> StraightThrough:
    r"""Straight-through estimators: every position keeps a weight and trains it, and the largest are the network.

    .. math::
        \theta \leftarrow \theta + \mathrm{inner}\bigl(g + \lambda\, \bar m \odot \theta\bigr), \qquad
        g = \nabla L(m \odot \theta), \qquad m \leftarrow \text{the largest } |\theta|

    The gradient at the network :math:`m \odot \theta`, which are the parameters that you hold, goes straight through
    the mask to all :math:`\theta`; the masks are chosen anew in every step. So a weight that was pruned comes back with
    what it has become meanwhile, and the state of the inner optimizer never starts again. With a `decay`
    :math:`\lambda` and ``pattern=n_m(2, 4)`` this is SR-STE, which pulls inactive weights (:math:`\bar m = 1 - m`)
    towards zero; with `at_random` the masks of every step are random. The default is also known as DNW.

    Weights of inactive positions cost an array like the pruned parameters, and the inner optimizer holds whole ones:
    ``storage="dense"``. Training starts from the weights of largest magnitude, or with ``masks=`` from those.

    Args:
        score: by which weights are chosen, of all positions: `weight_magnitude` (default), `at_random`, `taylor`, or
            any other that keeps no statistic.
        update_every: optimizer steps between choices of masks. Default 1 (all of these methods).
        start: the first step with such a choice, counted from 1. Default: `update_every`.
        stop: the masks stay from this step on. Default: never.
        decay: :math:`\lambda`, not negative. Default 0; SR-STE: 2e-4, with SGD.
        scope: ``"layer"``: the number of active weights of each layer stays (default). ``"global"``: their total.

    Returns:
        A topology for `agent_optax.sparsify`.

    Raises:
        ValueError: if an argument is out of range.
        TypeError: if `score` is not callable, or keeps a statistic.

    Example:
        >>> import agent_optax, optax
        >>> sr_ste = agent_optax.straight_through(decay=2e-4)
        >>> tx = agent_optax.sparsify(optax.sgd(0.1, momentum=0.9), sr_ste, pattern=agent_optax.n_m(2, 4))

    References:
        Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks from Scratch, ICLR 2021
        (SR-STE); Bengio, Léonard and Courville, Estimating or Propagating Gradients Through Stochastic Neurons, 2013;
        Wortsman, Farhadi and Rastegari, Discovering Neural Wirings, NeurIPS 2019.
    """
    check_score(score)
    if isinstance(score, RunningScore):
        raise TypeError(
            f"score must be a score of the step alone, and {score!r} keeps a statistic: use gradual_pruning."
        )
    check_scope(scope)
    check_number("decay", decay, "it pulls inactive weights towards zero, such as 2e-4")
    if is_concrete_number(decay) and decay < 0:
        raise ValueError(f"decay must not be negative, got {decay!r}: it pulls inactive weights towards zero.")
    return StraightThrough(update_times(update_every, start, stop), score, decay, scope)


@dataclasses.dataclass(frozen=True)
class StraightThrough(LatentTopology):
    """See `straight_through`."""

    times: UpdateTimes
    score: Score
    decay: Any
    scope: str

    @property
    def interval(self) -> int:
        """Steps between choices of masks."""
        return self.times.every

    @property
    def counts_jointly(self) -> bool:
        """Whether active weights of different layers are traded for each other."""
        return self.scope == "global"

    def init(self, params: optax.Params, masks: Any, targets: Sequence[Target]) -> jax.Array:
        """The number of active weights of each layer: int32 [layers]."""
        del params, masks
        return jnp.asarray([target.num_active for target in targets], jnp.int32)

    def start_masks(
        self, optimizer: SparseOptimizer, start: Start, params: optax.Params, pruned: Sequence[PrunedLeaf]
    ) -> Any:
        """The largest weights, unless masks were passed."""
        if not pruned or any(target.density is None for target in start.targets):
            return start.masks
        by_magnitude = dataclasses.replace(self, score=weight_magnitude)
        weights, structure = jax.tree.flatten(params)
        nodes = structure.flatten_up_to(start.masks)
        leaves = [Layer(weights[leaf.index], nodes[leaf.index], weights[leaf.index], None) for leaf in pruned]
        state, zero = self.init(params, start.masks, start.targets), jnp.zeros((), jnp.int32)
        masks, _ = rewired_masks(by_magnitude, pruned, leaves, state, zero, jax.random.key(0))
        for leaf, mask in zip(pruned, masks, strict=True):
            nodes[leaf.index] = mask
        return structure.unflatten(nodes)

    def latent_grads(self, masks: Any, grads: optax.Updates, weights: optax.Params) -> optax.Updates:
        r""":math:`g + \lambda\, \bar m \odot \theta`."""
        if is_concrete_number(self.decay) and self.decay == 0:
            return grads

        def decayed(mask: Any, g: jax.Array, w: jax.Array) -> jax.Array:
            return g if is_masked(mask) else g + jnp.where(mask, 0, self.decay * w).astype(g.dtype)

        return jax.tree.map(decayed, masks, grads, weights, is_leaf=is_masked)

    def is_due(self, step: jax.Array) -> jax.Array:
        """At start, start + update_every, ... below stop."""
        return self.times.include(step)

    def rewire(
        self, layers: Sequence[Layer], state: jax.Array, step: jax.Array, key: jax.Array
    ) -> tuple[list[jax.Array], jax.Array]:
        """The largest of all positions."""
        del step
        layers = [layer._replace(mask=~jnp.zeros_like(layer.mask)) for layer in layers]
        scores = scores_of(self.score, layers, key)
        return pruned_masks(layers, scores, state, state, True, self.scope), state

    def reconnect(
        self,
        optimizer: SparseOptimizer,
        pruned: Sequence[PrunedLeaf],
        state: SparsifyState,
        latent: LatentStep,
        key: jax.Array,
    ) -> Reconnected:
        """New masks, if they are due."""
        del optimizer
        due = self.is_due(state.topology_step)

        def choose(masks: list[jax.Array]) -> list[jax.Array]:
            leaves = [
                Layer(*arrays) for arrays in zip(latent.weights, masks, latent.grads, latent.ever_active, strict=True)
            ]
            return rewired_masks(self, pruned, leaves, state.topology_state, state.topology_step, key)[0]

        connected = when(due & latent.is_usable, choose, latent.connected)
        survivors = [new & old for new, old in zip(connected, latent.connected, strict=True)]
        return Reconnected(connected, survivors, latent.weights, due)
