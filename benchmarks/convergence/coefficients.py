"""Coefficients that were tried and are not in the library, made of its public parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from agent_optax.typing import CoefficientState, Estimate

DECAY = 0.98  # of averages over steps, as in gradient_regression


def _inner(first: Any, second: Any) -> jax.Array:
    products = jax.tree.map(lambda a, b: jnp.sum(a * b), first, second)
    return sum(jax.tree.leaves(products), start=jnp.zeros(()))


def _deviations(grads: optax.Updates, recalled: Any) -> tuple[optax.Updates, optax.Updates]:
    """The new and the old gradient minus the mean gradient; zeros before the first refresh."""

    def deviation(gradient: jax.Array, mean: jax.Array) -> jax.Array:
        return jnp.where(recalled.is_known, gradient - mean, 0)

    return tuple(jax.tree.map(deviation, tree, recalled.mean_grads) for tree in (grads, recalled.old_grads))


def _products(new: optax.Updates, old: optax.Updates) -> jax.Array:
    return jnp.stack([_inner(new, old), _inner(old, old), _inner(new, new)])


def _slope(covariance: jax.Array, variance: jax.Array, otherwise: jax.Array) -> jax.Array:
    measured = variance > 0
    return jnp.where(measured, jnp.clip(covariance / jnp.where(measured, variance, 1), 0, 1), otherwise)


class _ByPositionFields(NamedTuple):
    correlation: jax.Array  # float []: c of this step
    position: jax.Array  # int []: steps since the refresh
    recent: jax.Array  # float [3]: <new, old>, |old|^2, |new|^2 of deviations from the mean, averaged over steps
    current: jax.Array  # float [P, 3]: their sums since the refresh
    past: jax.Array  # float [P, 3]: the sums of the epochs before, averaged over epochs


class ByPositionState(_ByPositionFields, CoefficientState):
    """State of `ByPosition`; P parts of the time between two refreshes."""

    def refreshed(self, losses: jax.Array, old_losses: jax.Array | None, is_first: jax.Array) -> ByPositionState:
        """Averages the sums since the last refresh in; the position starts again."""
        del losses, old_losses, is_first
        averaged = jnp.where(self.past[:, 1:2] > 0, (self.past + self.current) / 2, self.current)
        return ByPositionState(
            correlation=jnp.ones_like(self.correlation),
            position=jnp.zeros_like(self.position),
            recent=jnp.zeros_like(self.recent),
            current=jnp.zeros_like(self.current),
            past=jnp.where(self.current[:, 1:2] > 0, averaged, self.past),
        )

    def variance_ratio(self, scaling: jax.Array) -> Estimate:
        """As `gradient_regression` estimates it."""
        w = scaling * self.correlation
        left = self.recent[2] - 2 * w * self.recent[0] + w**2 * self.recent[1]
        is_known = self.recent[2] > 0
        return Estimate(jnp.where(is_known, left / jnp.where(is_known, self.recent[2], 1), 1), is_known)


@dataclasses.dataclass(frozen=True)
class ByPosition:
    """Gradient regression with one coefficient for each part of the time between two refreshes.

    The old gradient is worth less the further the parameters are from the snapshot. A moving average over steps lags
    behind that; sums over the same part of the epochs before, each epoch with half the weight of the next, do not.
    In the first epoch it is the moving average.
    """

    steps_an_epoch: int
    parts: int = 8

    def init(self, params: optax.Params) -> ByPositionState:
        """Nothing measured."""
        del params
        zero, sums = jnp.zeros(()), jnp.zeros((self.parts, 3))
        return ByPositionState(zero, jnp.zeros((), jnp.int32), jnp.zeros(3), sums, sums)

    def _part(self, state: ByPositionState) -> jax.Array:
        return jnp.minimum(state.position * self.parts // self.steps_an_epoch, self.parts - 1)

    def prepare(self, coefficient_state: ByPositionState) -> ByPositionState:
        """The coefficient of this part, from the epochs before."""
        state = coefficient_state
        past = state.past[self._part(state)]
        recent = _slope(state.recent[0], state.recent[1], state.correlation)
        return state._replace(correlation=_slope(past[0], past[1], recent))

    def observe(
        self, coefficient_state: ByPositionState, grads: optax.Updates, recalled: Any, extra_args: Mapping[str, Any]
    ) -> ByPositionState:
        """Adds the inner products of this step."""
        del extra_args
        state = coefficient_state
        new, old = _deviations(grads, recalled)
        products = _products(new, old)
        return state._replace(
            position=state.position + 1,
            recent=DECAY * state.recent + (1 - DECAY) * products,
            current=state.current.at[self._part(state)].add(products),
        )


class _BiasAwareFields(NamedTuple):
    correlation: jax.Array  # float []: c
    weight: jax.Array  # float []: of the averages, up to 1
    moments: jax.Array  # float [3]: <new, old>, |old|^2, |new|^2
    new_bias: optax.Updates  # like the gradient
    old_bias: optax.Updates  # like the gradient: b


class BiasAwareState(_BiasAwareFields, CoefficientState):
    """State of `BiasAware`; averages over the steps since the refresh, of deviations from the mean gradient."""

    def refreshed(self, losses: jax.Array, old_losses: jax.Array | None, is_first: jax.Array) -> BiasAwareState:
        """Starts again from c = 0: whether there is a bias has to be seen first."""
        del losses, old_losses, is_first
        return jax.tree.map(jnp.zeros_like, self)


@dataclasses.dataclass(frozen=True)
class BiasAware:
    """The weight of least mean-squared error when old gradients do not scatter around g_mean but around g_mean + b.

    Under attack the batch is attacked and the mean gradient is clean. With b = E[g_old - g_mean] it is
    c = Cov(g_new, g_old) / (Var(g_old) + |b|^2), the covariance centred.
    """

    def init(self, params: optax.Params) -> BiasAwareState:
        """Nothing measured."""
        zeros = jax.tree.map(jnp.zeros_like, params)
        return BiasAwareState(jnp.zeros(()), jnp.zeros(()), jnp.zeros(3), zeros, zeros)

    def prepare(self, coefficient_state: BiasAwareState) -> BiasAwareState:
        """The coefficient comes from the steps before this one."""
        return coefficient_state

    def observe(
        self, coefficient_state: BiasAwareState, grads: optax.Updates, recalled: Any, extra_args: Mapping[str, Any]
    ) -> BiasAwareState:
        """Averages the deviations of this step and their inner products in."""
        del extra_args
        state = coefficient_state
        new, old = _deviations(grads, recalled)

        def averaged(average: Any, value: Any) -> Any:
            return jax.tree.map(lambda a, v: DECAY * a + (1 - DECAY) * v, average, value)

        weight = DECAY * state.weight + 1 - DECAY
        moments = averaged(state.moments, _products(new, old))
        new_bias, old_bias = averaged(state.new_bias, new), averaged(state.old_bias, old)
        covariance = moments[0] / weight - _inner(new_bias, old_bias) / weight**2
        return BiasAwareState(
            correlation=_slope(covariance, moments[1] / weight, state.correlation),
            weight=weight,
            moments=moments,
            new_bias=new_bias,
            old_bias=old_bias,
        )
