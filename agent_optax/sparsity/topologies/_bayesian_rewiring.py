"""BSR-Net: connections sampled by noise and sign changes, regrown anywhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from agent_optax._tree import is_masked
from agent_optax._validation import check_fraction, check_number, check_positive_int, is_concrete_number
from agent_optax.sparsity._layer import Target
from agent_optax.sparsity._pruned_leaf import PrunedLeaf
from agent_optax.sparsity._rewiring import when
from agent_optax.sparsity._rounding import tolerant_floor
from agent_optax.sparsity._sparse_optimizer import SparseOptimizer
from agent_optax.sparsity._state import SparsifyState, total
from agent_optax.sparsity.selection._top_k import random_scores, select
from agent_optax.sparsity.storages._latent import LatentStep, LatentTopology, Reconnected


def bayesian_rewiring(
    learning_rate: optax.ScalarOrSchedule,
    steps_per_epoch: int,
    noise_scale: optax.ScalarOrSchedule = 1e-6,
    density: float | None = None,
) -> BayesianRewiring:
    r"""Bayesian connectivity sampling (BSR-Net, deep rewiring): a weight that would change its sign is disconnected.

    Every position has a fixed sign s and a latent weight :math:`\theta`, and the weight of the network is

    .. math::
        w = s\,\theta \quad \text{where } \theta > 0, \qquad 0 \text{ elsewhere.}

    In every step the inner optimizer moves :math:`s\,\theta`, connected or not, by the gradient of connected weights;
    connected ones then get the noise :math:`\sqrt{2\,\eta / B}\; \mathcal N(0, \sigma^2)`. Those with
    :math:`\theta \le 0` are disconnected. When fewer than :math:`K = \lfloor p\,n \rfloor` of all n weights are
    connected, the shortfall is split over the layers by draws in proportion to their size, and grown at random
    positions from :math:`\theta = 10^{-12}`. A surplus is never cut.

    Signs are those of the parameters given to ``init``, so initialize as you would a dense network. What is kept for
    disconnected weights (one array like the pruned parameters, and their signs) is dense, and layers change in size:
    ``storage="dense"``. Unlike with other topologies, a weight that grows again keeps the optimizer state that it had,
    as in the published code.

    Args:
        learning_rate: :math:`\eta`, that of the inner optimizer: a number or the same schedule, called with the number
            of steps already taken.
        steps_per_epoch: B.
        noise_scale: :math:`\sigma`, a number or such a schedule. Default 1e-6 (the paper, which multiplies it by 10
            after epoch 100).
        density: p, the share of connected weights to which every step fills up. Default None: as many as at the start,
            which ``sparsify(..., sparsity=, distribution=)`` says.

    Returns:
        A topology for `agent_optax.sparsify`.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> import agent_optax, optax
        >>> topology = agent_optax.bayesian_rewiring(learning_rate=0.1, steps_per_epoch=391)
        >>> tx = agent_optax.sparsify(agent_optax.agent(0.1), topology, sparsity=0.99)

    References:
        Özdenizci and Legenstein, Training Adversarially Robust Sparse Networks via Bayesian Connectivity Sampling,
        ICML 2021; Bellec et al., Deep Rewiring: Training Very Sparse Deep Networks, ICLR 2018.
    """
    check_positive_int("steps_per_epoch", steps_per_epoch, "it counts optimizer steps")
    for name, number in (("learning_rate", learning_rate), ("noise_scale", noise_scale)):
        if not callable(number):
            check_number(name, number, "a number such as 0.1, or an Optax schedule")
            if is_concrete_number(number) and number < 0:
                raise ValueError(
                    f"{name} must not be negative, got {number!r}: it scales the noise of connected weights."
                )
    if density is not None:
        check_fraction("density", density, "it is the share of connected weights, such as 0.01")
    return BayesianRewiring(learning_rate, steps_per_epoch, noise_scale, density)


@dataclasses.dataclass(frozen=True)
class BayesianRewiring(LatentTopology):
    """See `bayesian_rewiring`."""

    learning_rate: optax.ScalarOrSchedule
    steps_per_epoch: int
    noise_scale: optax.ScalarOrSchedule
    density: float | None
    counts_jointly = True
    supports_groups = False
    supports_blocks = False
    new_weight = 1e-12

    @property
    def interval(self) -> int:
        """It changes at every step."""
        return 1

    def init(self, params: optax.Params, masks: Any, targets: Sequence[Target]) -> jax.Array:
        """K, the number of connections to which every step fills up: int32 []."""
        del params, masks
        if self.density is None:
            return jnp.asarray(sum(target.num_active for target in targets), jnp.int32)
        total = sum(target.num_units for target in targets)
        return jnp.asarray(tolerant_floor(self.density * total), jnp.int32)

    def is_due(self, step: jax.Array) -> jax.Array:
        """Always."""
        return jnp.ones_like(step, dtype=bool)

    def start_signs(self, masks: Any, params: optax.Params, key: jax.Array) -> Any:
        """Those of the parameters, random where one is zero."""
        keys = iter(jax.random.split(jax.random.fold_in(key, 2), max(len(jax.tree.leaves(masks)), 1)))

        def sign(mask: Any, p: jax.Array) -> Any:
            if is_masked(mask):
                return mask
            is_negative = jnp.where(p == 0, random_scores(next(keys), p) % 2 == 0, p < 0)
            return jnp.where(is_negative, -1, 1).astype(jnp.int8)

        return jax.tree.map(sign, masks, params, is_leaf=is_masked)

    def noise(self, step: jax.Array, mask: jax.Array, weights: jax.Array, key: jax.Array) -> jax.Array:
        """On connected weights."""
        std = self.noise_std(step).astype(weights.dtype)
        return jnp.where(mask, std * jax.random.normal(key, weights.shape, weights.dtype), 0)

    def noise_std(self, step: jax.Array) -> jax.Array:
        """The standard deviation of the noise at this step, counted from 1."""

        def at(number: optax.ScalarOrSchedule) -> Any:
            return number(step - 1) if callable(number) else number

        return jnp.sqrt(2 * jnp.asarray(at(self.learning_rate)) / self.steps_per_epoch) * at(self.noise_scale)

    def reconnect(
        self,
        optimizer: SparseOptimizer,
        pruned: Sequence[PrunedLeaf],
        state: SparsifyState,
        latent: LatentStep,
        key: jax.Array,
    ) -> Reconnected:
        """Weights that keep their sign, and as many new ones as are missing."""
        del optimizer, pruned
        usable = latent.is_usable
        signs = [s.astype(v.dtype) for s, v in zip(latent.signs, latent.weights, strict=True)]
        survivors = [
            jnp.where(usable, v * s > 0, old) for v, s, old in zip(latent.weights, signs, latent.connected, strict=True)
        ]
        num_connected = total([jnp.sum(m, dtype=jnp.int32) for m in survivors])
        num_missing = jnp.where(usable, state.topology_state - num_connected, 0)

        def grow(masks: list[jax.Array]) -> list[jax.Array]:
            grown = self.grown(masks, jnp.maximum(num_missing, 0), key)
            return [m | g for m, g in zip(masks, grown, strict=True)]

        connected = when(num_missing > 0, grow, survivors)
        weights = [
            jnp.where(new & ~old, s * max(self.new_weight, float(jnp.finfo(v.dtype).smallest_normal)), v)
            for new, old, v, s in zip(connected, survivors, latent.weights, signs, strict=True)
        ]
        return Reconnected(connected, survivors, weights, self.is_due(state.topology_step))

    def grown(self, connected: Sequence[jax.Array], num_missing: jax.Array, key: jax.Array) -> list[jax.Array]:
        """Masks of new connections, `num_missing` in all, or fewer when a layer that was drawn is full."""
        split_key, *keys = jax.random.split(key, len(connected) + 1)
        sizes = jnp.asarray([mask.size for mask in connected], jnp.float32)
        drawn = jax.random.multinomial(split_key, num_missing.astype(jnp.float32), sizes / jnp.sum(sizes))
        masks = []
        for mask, number, layer_key in zip(connected, drawn.astype(jnp.int32), keys, strict=True):
            free = mask.size - jnp.sum(mask, dtype=jnp.int32)
            masks.append(select(random_scores(layer_key, mask), jnp.minimum(number, free), candidates=~mask))
        return masks
