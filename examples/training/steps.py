"""An epoch on the device: the refresh pass, then many steps in one `jax.lax.scan`."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from loaders import LabelledImages

import agent_optax
from training.augmentation import augment
from training.config import Config
from training.network import as_pixels
from training.objective import Objective

FIXED_BATCHES, ORDER, REFRESH, STEP = range(4)  # what a key is used for


class TrainState(NamedTuple):
    """Everything that a run goes on from."""

    params: Any
    batch_stats: Any  # running means and variances of BatchNorm
    opt_state: optax.OptState
    key: jax.Array  # the root of all randomness; never changes
    epoch: jax.Array  # int32 []: epochs completed
    epoch_step: jax.Array  # int32 []: steps of the current epoch completed
    sums: dict[str, jax.Array]  # float32 [] each, over these steps: loss, images got right, the correction's c and w

    def begin_epoch(self) -> TrainState:
        """The start of the next epoch."""
        return self._replace(
            epoch=self.epoch + 1,
            epoch_step=jnp.zeros_like(self.epoch_step),
            sums=jax.tree.map(jnp.zeros_like, self.sums),
        )


class Order(NamedTuple):
    """Which images each step of an epoch takes."""

    indices: jax.Array  # int32 [S, B]
    batch_index: jax.Array  # int32 [S]: which of the fixed batches that is, where batches are fixed


@dataclasses.dataclass(frozen=True, eq=False)
class Steps:
    """The compiled parts of training; `images` [N, H, W, C] are bytes, all of them or those of a few batches."""

    config: Config
    objective: Objective
    optimizer: optax.GradientTransformationExtraArgs
    num_images: int
    initial_stats: Any

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch; a last batch that is not full is left out."""
        return self.num_images // self.config.batch_size

    @functools.partial(jax.jit, static_argnums=0)
    def start(self, params: Any, key: jax.Array) -> TrainState:
        """The state before the first step, with exactly sparse parameters."""
        opt_state = self.optimizer.init(params)
        if self.config.topology.name != "dense":
            params = agent_optax.mask_params(params, opt_state)
        names = ["loss", "num_right"]
        if self.config.correction.memory != "none":
            names += ["correlation", "correction_weight"]
        zero = jnp.zeros((), jnp.int32)
        sums = {name: jnp.zeros(()) for name in names}
        return TrainState(params, self.initial_stats, opt_state, key, zero, zero, sums)

    @functools.partial(jax.jit, static_argnums=0)
    def order(self, key: jax.Array, epoch: jax.Array) -> Order:
        """The order of the data in an epoch, which the seed and the number of the epoch decide."""

        def shuffled_batches(key: jax.Array) -> jax.Array:
            shape = self.per_epoch, self.config.batch_size
            return jax.random.permutation(key, self.num_images)[: shape[0] * shape[1]].reshape(shape)

        order_key = _fold(key, epoch, ORDER)
        if not self.config.correction.has_fixed_batches:
            return Order(shuffled_batches(order_key), jnp.arange(self.per_epoch))
        batch_index = jax.random.permutation(order_key, self.per_epoch)
        return Order(shuffled_batches(_fold(key, 0, FIXED_BATCHES))[batch_index], batch_index)

    def refresh_indices(self, order: Order) -> jax.Array:
        """The images [S, B] of the refresh pass: those of the epoch, or of its first batches.

        Fixed batches are in the order that `batch_index` counts.
        """
        if self.config.correction.has_fixed_batches:
            return order.indices[jnp.argsort(order.batch_index)]
        return order.indices[: self.config.correction.refresh_batches]

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def refresh(self, state: TrainState, images: jax.Array, labels: jax.Array, indices: jax.Array) -> TrainState:
        """The refresh pass over the batches with these indices, augmented as those of the steps are."""

        def loss_fn(params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
            rows, key = batch
            return self._refresh_loss(params, (images[rows], labels[rows], key))

        batches = indices, self._refresh_keys(state, len(indices))
        return state._replace(opt_state=agent_optax.refresh(loss_fn, state.params, state.opt_state, batches))

    def refresh_from_host(self, state: TrainState, data: LabelledImages, indices: np.ndarray) -> TrainState:
        """The same, with one batch at a time on the device."""
        keys = self._refresh_keys(state, len(indices))
        batches = (
            (jnp.asarray(data.images[rows]), jnp.asarray(data.labels[rows]), keys[i]) for i, rows in enumerate(indices)
        )
        return state._replace(opt_state=agent_optax.refresh(self._refresh_loss, state.params, state.opt_state, batches))

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def take(self, state: TrainState, images: jax.Array, labels: jax.Array, order: Order) -> TrainState:
        """One step for each row of `order`."""
        grads_fn = agent_optax.value_and_grads(self.objective.loss, has_aux=True)

        def step(state: TrainState, order: Order) -> tuple[TrainState, None]:
            params, batch_stats, opt_state = state.params, state.batch_stats, state.opt_state
            augment_key, attack_key = jax.random.split(_fold(state.key, state.epoch, STEP, state.epoch_step))
            batch_images = self._augmented(augment_key, images[order.indices])
            batch = self.objective.prepare(params, batch_stats, batch_images, labels[order.indices], attack_key)
            # The statistics come from the evaluation at the current weights; those at the old ones are dropped.
            ((loss, (batch_stats, num_right)), grads), extras = grads_fn(params, opt_state, batch_stats, batch)
            if self.config.correction.has_fixed_batches:
                extras["batch_index"] = order.batch_index
            updates, opt_state = self.optimizer.update(grads, opt_state, params, **extras)
            measured = {"loss": loss, "num_right": num_right}
            if self.config.correction.memory != "none":
                measured |= agent_optax.diagnostics(opt_state)
            return state._replace(
                params=optax.apply_updates(params, updates),
                batch_stats=batch_stats,
                opt_state=opt_state,
                epoch_step=state.epoch_step + 1,
                sums={name: total + measured[name] for name, total in state.sums.items()},
            ), None

        return jax.lax.scan(step, state, order)[0]

    def _augmented(self, key: jax.Array, images: jax.Array) -> jax.Array:
        return as_pixels(augment(key, images, shift=self.config.data.shift, flip=self.config.data.flip))

    def _refresh_loss(self, params: Any, batch: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        images, labels, key = batch
        batch = {"images": self._augmented(key, images), "labels": labels}
        return self.objective.natural_loss(params, self.initial_stats, batch)

    def _refresh_keys(self, state: TrainState, count: int) -> jax.Array:
        return jax.random.split(_fold(state.key, state.epoch, REFRESH), count)


def _fold(key: jax.Array, *numbers: jax.typing.ArrayLike) -> jax.Array:
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key
