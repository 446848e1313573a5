"""Topologies that replace a part of the active weights: drop some, grow as many."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from agent_optax._tree import all_finite, is_masked, statistics_dtype
from agent_optax._validation import check_fraction
from agent_optax.sparsity._equal_layers import map_layers
from agent_optax.sparsity._layer import Layer, Target
from agent_optax.sparsity._running_score import RunningScore, observed_statistics, start_statistics
from agent_optax.sparsity._topology import Topology
from agent_optax.sparsity.selection._top_k import num_true, select
from agent_optax.sparsity.topologies._redistribution import (
    RedistributionState,
    drop_fractions,
    growth,
    shares,
    start_redistribution,
)
from agent_optax.sparsity.topologies._scores import Score, gradient_magnitude, weight_magnitude
from agent_optax.sparsity.topologies._update_times import (
    UpdateTimes,
    check_drop_fraction,
    fraction_at,
    num_dropped,
    update_times,
)


class DropAndGrowState(NamedTuple):
    """What a topology of this kind remembers."""

    gradient_momentum: Any  # like params: moving average of the dense gradients; None unless momentum is given
    redistribution: RedistributionState | None
    drop_statistics: Any  # like params: what a running score keeps; None unless `drop` is one


def drop_and_grow(
    drop: Score = weight_magnitude,
    grow: Score = gradient_magnitude,
    *,
    update_every: int = 100,
    drop_fraction: optax.ScalarOrSchedule = 0.3,
    start: int | None = None,
    stop: int | None = None,
    redistribute: Score | None = None,
    momentum: float | None = None,
) -> DropAndGrow:
    r"""A topology from its parts: what to drop, what to grow, and which layers get more.

    In each layer the :math:`\lceil \zeta\, n_{active} \rceil` active weights of least `drop` score are dropped, and the
    inactive positions of largest `grow` score are grown from zero: as many as were dropped there, or, with
    `redistribute`, the layer's share of all that were dropped. `rigl`, `set_` and `snfs` are made of this.

    Args:
        drop: the score of active weights: `weight_magnitude` (default, as in all of these methods), `taylor`,
            `magnitude_by_sign`, `movement()`, `fisher()`, or any function of (layer, key) that returns an array of the
            layer's shape; a layer has the fields weights, mask, grads, ever_active and momentum.
        grow: the score of inactive positions: `gradient_magnitude` (default, RigL), `at_random` (SET), `never_active`,
            `momentum_magnitude` (SNFS), or a function as above.
        update_every: optimizer steps between topology updates. Default 100 (RigL).
        drop_fraction: :math:`\zeta`, in [0, 1], or an Optax schedule called with the step. Default 0.3 (RigL).
        start: the first step with an update, counted from 1. Default: `update_every`.
        stop: no update from this step on. Default: never stops.
        redistribute: a score whose mean over the active weights of a layer, before the drop, decides its share of the
            regrowth. The number of active weights of a layer changes then, their total stays within a few of what it
            was, and ``storage="dense"`` is needed. Default None: a layer keeps its number.
        momentum: the decay of a moving average of the dense gradients, for `momentum_magnitude`; it costs one array
            like the pruned parameters. Default None: no average is kept.

    Returns:
        A topology for `agent_optax.sparsify`.

    Raises:
        ValueError: if an argument is out of range.
        TypeError: if a score is not callable, or one but `drop` keeps a statistic.

    Example:
        >>> import agent_optax, optax
        >>> topology = agent_optax.drop_and_grow(drop=agent_optax.taylor, grow=agent_optax.never_active)
        >>> tx = agent_optax.sparsify(optax.adamw(1e-3), topology, sparsity=0.9)

    References:
        Evci et al., Rigging the Lottery, ICML 2020; Dettmers and Zettlemoyer, Sparse Networks from Scratch: Faster
        Training without Losing Performance, 2019, for the redistribution.
    """
    check_drop_fraction(drop_fraction)
    for name, score in (("drop", drop), ("grow", grow), ("redistribute", redistribute)):
        if not callable(score) and not (name == "redistribute" and score is None):
            raise TypeError(f"{name} must be a score such as agent_optax.weight_magnitude, got {score!r}.")
        if isinstance(score, RunningScore) and name != "drop":
            raise TypeError(
                f"{name} must be a score of the step alone, and {score!r} keeps a statistic: pass it as drop=."
            )
    if momentum is not None:
        check_fraction("momentum", momentum, "it is the decay of a moving average, such as 0.9", below_one=True)
    return DropAndGrow(update_times(update_every, start, stop), drop_fraction, drop, grow, redistribute, momentum)


def rigl_rule() -> DropAndGrow:
    """Drop by magnitude, grow by gradient: for topologies that are due at times of their own."""
    return drop_and_grow(weight_magnitude, gradient_magnitude)


@dataclasses.dataclass(frozen=True)
class DropAndGrow(Topology):
    """See `drop_and_grow`."""

    times: UpdateTimes
    drop_fraction: optax.ScalarOrSchedule
    drop: Score
    grow: Score
    redistribute: Score | None = None
    momentum: float | None = None

    @property
    def interval(self) -> int:
        """Steps between topology updates."""
        return self.times.every

    @property
    def keeps_counts(self) -> bool:
        """Whether the number of active weights of a layer never changes."""
        return self.redistribute is None

    @property
    def is_layerwise(self) -> bool:
        """Whether one layer's update needs no other layer."""
        return self.redistribute is None

    @property
    def counts_jointly(self) -> bool:
        """Whether active weights of different layers are traded for each other."""
        return self.redistribute is not None

    @property
    def supports_groups(self) -> bool:
        """Whether it keeps a fixed number of active weights in groups of them."""
        return self.redistribute is None

    def init(self, params: optax.Params, masks: Any, targets: Sequence[Target]) -> Any:
        """Zero momentum, no deficit."""
        if self.momentum is None and self.redistribute is None and not isinstance(self.drop, RunningScore):
            return ()
        momentum = redistribution = None
        if self.momentum is not None:
            momentum = jax.tree.map(
                lambda m, p: m if is_masked(m) else jnp.zeros_like(p), masks, params, is_leaf=is_masked
            )
        if self.redistribute is not None:
            active = jnp.asarray(sum(target.num_active for target in targets), jnp.int32)
            redistribution = start_redistribution(active, statistics_dtype(params))
        return DropAndGrowState(momentum, redistribution, start_statistics(self.drop, params, masks))

    def observe(self, state: Any, grads: optax.Updates, params: optax.Params) -> Any:
        r""":math:`m \leftarrow \beta m + (1 - \beta) g`; a gradient that is not finite is left out."""
        if isinstance(self.drop, RunningScore):
            statistics = observed_statistics(self.drop, state.drop_statistics, grads, params)
            state = state._replace(drop_statistics=statistics)
        if self.momentum is None:
            return state
        beta, usable = self.momentum, all_finite(grads)

        def average(m: Any, g: jax.Array) -> Any:
            return m if is_masked(m) else jnp.where(usable, beta * m + (1 - beta) * g.astype(m.dtype), m)

        average_grads = jax.tree.map(average, state.gradient_momentum, grads, is_leaf=is_masked)
        return state._replace(gradient_momentum=average_grads)

    def momenta(self, state: Any, num_layers: int) -> list[jax.Array | None]:
        """The moving averages that `observe` keeps."""
        return [None] * num_layers if self.momentum is None else jax.tree.leaves(state.gradient_momentum)

    def statistics(self, state: Any, num_layers: int) -> list[jax.Array | None]:
        """What the score by which to drop keeps."""
        is_running = isinstance(self.drop, RunningScore)
        return jax.tree.leaves(state.drop_statistics) if is_running else [None] * num_layers

    def is_due(self, step: jax.Array) -> jax.Array:
        """At start, start + update_every, ... below stop."""
        return self.times.include(step)

    def rewire_layer(self, layer: Layer, step: jax.Array, key: jax.Array) -> jax.Array:
        """The number of active weights stays."""
        return self.replace(layer, fraction_at(self.drop_fraction, step), key)

    def replace(self, layer: Layer, fraction: jax.Array, key: jax.Array) -> jax.Array:
        """The mask after dropping a fraction of the active weights and growing as many."""
        drop_key, grow_key = jax.random.split(key)
        num_active = num_true(layer.mask) if layer.count is None else jnp.asarray(layer.count, jnp.int32)
        n = num_dropped(fraction, num_active)
        drop_scores = self.drop(layer, drop_key)
        kept = select(drop_scores, num_active - n, candidates=layer.mask)
        # Weights dropped just now are candidates for growth: grown again, they keep their value.
        scores = self.grow(layer, grow_key)
        if layer.groups is not None:
            return layer.groups.best(scores, num_active, kept, drop_scores)
        return kept | select(scores, n, candidates=~kept)

    def rewire(
        self, layers: Sequence[Layer], state: Any, step: jax.Array, key: jax.Array
    ) -> tuple[list[jax.Array], Any]:
        """With redistribution: what is dropped in one layer grows in another."""
        statistic: Any = self.redistribute
        fraction = fraction_at(self.drop_fraction, step)
        keys = jax.random.split(key, max(len(layers), 1))
        real = state.redistribution.adjusted_growth.dtype
        active = jnp.stack([num_true(layer.mask) for layer in layers])
        sizes = jnp.asarray([layer.mask.size for layer in layers], jnp.int32)

        def mean(kind: None, layer: Layer, num_active: jax.Array, key: jax.Array) -> tuple[jax.Array, tuple[()]]:
            del kind
            scores = jnp.where(layer.mask, statistic(layer, key), 0).astype(real)
            return jnp.sum(scores) / jnp.maximum(num_active, 1).astype(real), ()

        def replace(
            kind: None, layer: Layer, num_kept: jax.Array, num_grown: jax.Array, key: jax.Array
        ) -> tuple[jax.Array, tuple[()]]:
            del kind
            drop_key, grow_key = jax.random.split(key)
            kept = select(self.drop(layer, drop_key), num_kept, candidates=layer.mask)
            return kept | select(self.grow(layer, grow_key), num_grown, candidates=~kept), ()

        kinds = [None] * len(layers)
        share = shares(jnp.stack(map_layers(mean, kinds, layers, active, keys)[0]))
        sparsity = (sizes - active).astype(real) / sizes.astype(real)
        dropped = num_dropped(drop_fractions(fraction.astype(real), share, sparsity), active)
        dropped = jnp.minimum(dropped, jnp.maximum(active - 1, 0))  # no layer ends with none
        budget = jnp.sum(dropped).astype(real) + state.redistribution.adjusted_growth
        regrown = jnp.maximum(growth(share, budget, sizes - active + dropped), 0).astype(jnp.int32)
        masks, _ = map_layers(replace, kinds, layers, active - dropped, regrown, keys)
        return masks, state._replace(redistribution=state.redistribution.after(jnp.sum(active - dropped + regrown)))
