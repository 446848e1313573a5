"""Gradual pruning: from dense to sparse while training, with regrowth if wanted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from agent_optax._tree import statistics_dtype
from agent_optax._validation import check_fraction, is_concrete_number
from agent_optax.sparsity._equal_layers import map_layers
from agent_optax.sparsity._layer import Layer, Target
from agent_optax.sparsity._rounding import tolerant_ceil
from agent_optax.sparsity._topology import Topology
from agent_optax.sparsity.selection._top_k import num_true, select, select_from_all
from agent_optax.sparsity.topologies._drop_and_grow import rigl_rule
from agent_optax.sparsity.topologies._update_times import (
    UpdateTimes,
    check_drop_fraction,
    fraction_at,
    update_times,
)


class GradualPruningState(NamedTuple):
    """Where each layer comes from and goes to."""

    start_sparsity: jax.Array  # float [layers]
    final_sparsity: jax.Array  # float [layers], as requested
    final_active: jax.Array  # int32 [layers], the exact number


def gradual_pruning(
    stop: int,
    update_every: int = 100,
    start: int | None = None,
    initial_sparsity: float = 0.0,
    drop_fraction: optax.ScalarOrSchedule = 0.0,
    scope: Literal["layer", "global"] = "layer",
) -> GradualPruning:
    r"""Gradual magnitude pruning on a cubic schedule; with `drop_fraction`, GraNet.

    At step t the share of inactive weights is

    .. math::
        s_t = s_f + (s_i - s_f) \left(1 - \frac{t - t_0}{T - t_0}\right)^3

    and the active weights of least magnitude are removed to reach it: in each layer, :math:`\lfloor s_t n \rfloor` of
    its n weights are inactive. :math:`s_f`, for each layer, is what ``sparsify(..., sparsity=, distribution=)`` says,
    and is reached exactly, at step T. With a `drop_fraction` each update but that last one also replaces a share of the
    active weights as RigL does, so that a weight removed too early can come back.

    Layers change in size, so this needs ``storage="dense"``. With ``masks=`` training starts from those, and
    `sparsity` still says where it ends.

    Args:
        stop: T, the step of the last topology update, counted from 1.
        update_every: optimizer steps between topology updates. Default 100 (Zhu and Gupta: 100 to 1000).
        start: :math:`t_0`, the first step with an update. Default: `update_every`.
        initial_sparsity: :math:`s_i`, in [0, 1), shared among layers by the distribution. Default 0 (Zhu and Gupta;
            GraNet starts at 0, or at 0.5 for sparse-to-sparse training).
        drop_fraction: the share of active weights replaced, in [0, 1], or an Optax schedule called with the step.
            Default 0: pruning alone. GraNet: ``optax.cosine_decay_schedule(0.5, total_steps)``.
        scope: ``"layer"``: each layer follows its own schedule (default, Zhu and Gupta). ``"global"``: one threshold
            on the magnitude for all layers together; the distribution then matters for the start only.

    Returns:
        A topology for `agent_optax.sparsify`.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> import agent_optax, optax
        >>> topology = agent_optax.gradual_pruning(stop=800, start=100)
        >>> tx = agent_optax.sparsify(optax.sgd(0.1), topology, sparsity=0.95, distribution=agent_optax.uniform)

    References:
        Zhu and Gupta, To Prune, or Not to Prune, 2017, for the schedule; Liu et al., Sparse Training via Boosting
        Pruning Plasticity with Neuroregeneration, NeurIPS 2021, for the regrowth (GraNet).
    """
    times = update_times(update_every, start, stop)
    check_fraction("initial_sparsity", initial_sparsity, "it is the share of inactive weights", below_one=True)
    check_drop_fraction(drop_fraction)
    if scope not in ("layer", "global"):
        raise ValueError(f"scope must be 'layer' or 'global', got {scope!r}.")
    return GradualPruning(times, stop, drop_fraction, scope, float(initial_sparsity))


@dataclasses.dataclass(frozen=True)
class GradualPruning(Topology):
    """See `gradual_pruning`."""

    times: UpdateTimes
    end: int
    drop_fraction: optax.ScalarOrSchedule
    scope: str
    initial_sparsity: float | None = 0.0
    keeps_counts = False

    @property
    def interval(self) -> int:
        """Steps between topology updates."""
        return self.times.every

    @property
    def is_layerwise(self) -> bool:
        """Staggered, a layer would miss its last update."""
        return False

    @property
    def counts_jointly(self) -> bool:
        """Whether active weights of different layers are traded for each other."""
        return self.scope == "global"

    def init(self, params: optax.Params, masks: Any, targets: Sequence[Target]) -> GradualPruningState:
        """The start is what the masks say."""
        del masks
        real = statistics_dtype(params)
        final = [0.0 if target.density is None else 1 - target.density for target in targets]
        start = [1 - target.num_start / target.num_units for target in targets]
        return GradualPruningState(
            start_sparsity=jnp.asarray(start, real),
            final_sparsity=jnp.asarray(final, real),
            final_active=jnp.asarray([target.num_active for target in targets], jnp.int32),
        )

    def is_due(self, step: jax.Array) -> jax.Array:
        """At start, start + update_every, ... below stop, and at stop."""
        return self.times.include(step) | (step == self.end)

    def rewire(
        self, layers: Sequence[Layer], state: GradualPruningState, step: jax.Array, key: jax.Array
    ) -> tuple[list[jax.Array], GradualPruningState]:
        """Prunes, then replaces."""
        masks = self._pruned(layers, self._targets(layers, state, step), state.final_active, is_last=step >= self.end)
        if not (is_concrete_number(self.drop_fraction) and self.drop_fraction == 0):
            fraction = jnp.where(step < self.end, fraction_at(self.drop_fraction, step), 0)
            keys = jax.random.split(key, max(len(layers), 1))
            rule = rigl_rule()

            def replace(kind: None, layer: tuple[Layer, jax.Array], key: jax.Array) -> tuple[jax.Array, tuple[()]]:
                del kind
                pruned, mask = layer
                return rule.replace(pruned._replace(mask=mask, groups=None), fraction, key), ()

            masks, _ = map_layers(replace, [None] * len(layers), list(zip(layers, masks, strict=True)), keys)
        return masks, state

    def _targets(self, layers: Sequence[Layer], state: GradualPruningState, step: jax.Array) -> jax.Array:
        """The number of active weights of each layer [layers] at this step."""
        first = self.times.start
        real = state.final_sparsity.dtype
        remaining = (1 - jnp.clip((step - first).astype(real) / (self.end - first), 0, 1)) ** 3
        sparsity = state.final_sparsity + (state.start_sparsity - state.final_sparsity) * remaining
        sizes = jnp.asarray([layer.mask.size for layer in layers], jnp.int32)
        return jnp.where(step >= self.end, state.final_active, tolerant_ceil((1 - sparsity) * sizes.astype(real)))

    def _pruned(
        self, layers: Sequence[Layer], targets: jax.Array, final_active: jax.Array, is_last: jax.Array
    ) -> list[jax.Array]:
        """The masks of the weights of largest magnitude; the best of each group are safe, and all that is left at last.

        At last a group that has too few left is filled up: regrowth may have taken some.
        """
        scores = [_magnitude(layer, number) for layer, number in zip(layers, final_active, strict=True)]
        masks = self._largest(scores, layers, targets)
        return [
            mask
            if layer.groups is None
            else jnp.where(is_last, layer.groups.best(jnp.abs(layer.weights), number, layer.mask), mask)
            for mask, layer, number in zip(masks, layers, final_active, strict=True)
        ]

    def _largest(self, scores: Sequence[jax.Array], layers: Sequence[Layer], targets: jax.Array) -> list[jax.Array]:
        active = jnp.stack([num_true(layer.mask) for layer in layers])
        masks = [layer.mask for layer in layers]
        if self.scope == "global":
            return select_from_all(scores, jnp.minimum(jnp.sum(targets), jnp.sum(active)), masks)

        def largest(kind: None, layer: tuple[jax.Array, jax.Array], number: jax.Array) -> tuple[jax.Array, tuple[()]]:
            del kind
            return select(layer[0], number, layer[1]), ()

        pairs = list(zip(scores, masks, strict=True))
        return map_layers(largest, [None] * len(pairs), pairs, jnp.minimum(targets, active))[0]


def _magnitude(layer: Layer, final_active: jax.Array) -> jax.Array:
    score = jnp.abs(layer.weights)
    if layer.groups is None:
        return score
    return jnp.where(layer.groups.best(score, final_active), jnp.inf, score)
