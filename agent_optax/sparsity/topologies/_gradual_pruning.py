"""Gradual pruning: from dense to sparse while training, with regrowth if wanted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from agent_optax._tree import statistics_dtype
from agent_optax._validation import check_fraction, check_number, check_positive_int, is_concrete_number
from agent_optax.sparsity._equal_layers import map_layers
from agent_optax.sparsity._layer import Layer, Target
from agent_optax.sparsity._rounding import tolerant_ceil
from agent_optax.sparsity._running_score import RunningScore, observed_statistics, start_statistics
from agent_optax.sparsity._topology import Topology
from agent_optax.sparsity.topologies._drop_and_grow import rigl_rule
from agent_optax.sparsity.topologies._prune import check_scope, check_score, pruned_masks, scores_of
from agent_optax.sparsity.topologies._scores import Score, weight_magnitude
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
    score_statistics: Any  # like params: what a running score keeps; None unless the score is one


def gradual_pruning(
    stop: int,
    update_every: int = 100,
    start: int | None = None,
    initial_sparsity: float = 0.0,
    drop_fraction: optax.ScalarOrSchedule = 0.0,
    scope: Literal["layer", "global"] = "layer",
    score: Score = weight_magnitude,
    power: float = 3.0,
) -> GradualPruning:
    r"""Gradual pruning on a polynomial schedule, by magnitude or another score; with `drop_fraction`, GraNet.

    At step t the share of inactive weights is

    .. math::
        s_t = s_f + (s_i - s_f) \left(1 - \frac{t - t_0}{T - t_0}\right)^p

    and the active weights of least score are removed to reach it: in each layer, :math:`\lfloor s_t n \rfloor` of
    its n weights are inactive. :math:`s_f`, for each layer, is what ``sparsify(..., sparsity=, distribution=)`` says,
    and is reached exactly, at step T. With a `drop_fraction` each update but that last one also replaces a share of the
    active weights as RigL does, so that a weight removed too early can come back.

    Layers change in size, so this needs ``storage="dense"``. With ``masks=`` training starts from those, and
    `sparsity` still says where it ends. With ``start=stop`` all is pruned at once, at that step.

    Args:
        stop: T, the step of the last topology update, counted from 1.
        update_every: optimizer steps between topology updates. Default 100 (Zhu and Gupta: 100 to 1000).
        start: :math:`t_0`, the first step with an update. Default: `update_every`.
        initial_sparsity: :math:`s_i`, in [0, 1), shared among layers by the distribution. Default 0 (Zhu and Gupta;
            GraNet starts at 0, or at 0.5 for sparse-to-sparse training).
        drop_fraction: the share of active weights replaced, in [0, 1], or an Optax schedule called with the step.
            Default 0: pruning alone. GraNet: ``optax.cosine_decay_schedule(0.5, total_steps)``.
        scope: ``"layer"``: each layer follows its own schedule (default, Zhu and Gupta). ``"global"``: one threshold
            on the score for all layers together; the distribution then matters for the start only. Layers of different
            scale compare by `normalized` scores.
        score: by which weights are kept: `weight_magnitude` (default, Zhu and Gupta), `taylor`, `movement()`,
            `fisher()`, `at_random`, or any score as for `drop_and_grow`.
        power: p, positive: 1 prunes evenly, more prunes most early. Default 3 (Zhu and Gupta).

    Returns:
        A topology for `agent_optax.sparsify`.

    Raises:
        ValueError: if an argument is out of range.
        TypeError: if `score` is not callable.

    Example:
        >>> import agent_optax, optax
        >>> topology = agent_optax.gradual_pruning(stop=800, start=100)
        >>> tx = agent_optax.sparsify(optax.sgd(0.1), topology, sparsity=0.95, distribution=agent_optax.uniform)

    References:
        Zhu and Gupta, To Prune, or Not to Prune, 2017, for the schedule; Liu et al., Sparse Training via Boosting
        Pruning Plasticity with Neuroregeneration, NeurIPS 2021, for the regrowth (GraNet).
    """
    check_positive_int("stop", stop, "it is the step of the last topology update")
    times = update_times(update_every, start, None if start == stop else stop)._replace(stop=stop)
    check_fraction("initial_sparsity", initial_sparsity, "it is the share of inactive weights", below_one=True)
    check_drop_fraction(drop_fraction)
    check_scope(scope)
    check_score(score)
    check_number("power", power, "it is that of the polynomial, such as 3")
    if is_concrete_number(power) and power <= 0:
        raise ValueError(f"power must be positive, got {power!r}: 1 prunes evenly, 3 is the cubic.")
    return GradualPruning(times, stop, drop_fraction, scope, score, power, float(initial_sparsity))


@dataclasses.dataclass(frozen=True)
class GradualPruning(Topology):
    """See `gradual_pruning`."""

    times: UpdateTimes
    end: int
    drop_fraction: optax.ScalarOrSchedule
    scope: str
    score: Score
    power: float
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
        real = statistics_dtype(params)
        final = [0.0 if target.density is None else 1 - target.density for target in targets]
        start = [1 - target.num_start / target.num_units for target in targets]
        return GradualPruningState(
            start_sparsity=jnp.asarray(start, real),
            final_sparsity=jnp.asarray(final, real),
            final_active=jnp.asarray([target.num_active for target in targets], jnp.int32),
            score_statistics=start_statistics(self.score, params, masks),
        )

    def observe(self, state: GradualPruningState, grads: optax.Updates, params: optax.Params) -> GradualPruningState:
        """What the score keeps."""
        statistics = observed_statistics(self.score, state.score_statistics, grads, params)
        return state._replace(score_statistics=statistics)

    def statistics(self, state: GradualPruningState, num_layers: int) -> list[jax.Array | None]:
        """What `observe` keeps."""
        is_running = isinstance(self.score, RunningScore)
        return jax.tree.leaves(state.score_statistics) if is_running else [None] * num_layers

    def is_due(self, step: jax.Array) -> jax.Array:
        """At start, start + update_every, ... below stop, and at stop."""
        return self.times.include(step) | (step == self.end)

    def rewire(
        self, layers: Sequence[Layer], state: GradualPruningState, step: jax.Array, key: jax.Array
    ) -> tuple[list[jax.Array], GradualPruningState]:
        """Prunes, then replaces."""
        targets = self._targets(layers, state, step)
        key, score_key = jax.random.split(key)
        scores = scores_of(self.score, layers, score_key)
        masks = pruned_masks(layers, scores, targets, state.final_active, step >= self.end, self.scope)
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
        remaining = (1 - jnp.clip((step - first).astype(real) / max(self.end - first, 1), 0, 1)) ** self.power
        sparsity = state.final_sparsity + (state.start_sparsity - state.final_sparsity) * remaining
        sizes = jnp.asarray([layer.mask.size for layer in layers], jnp.int32)
        return jnp.where(step >= self.end, state.final_active, tolerant_ceil((1 - sparsity) * sizes.astype(real)))
