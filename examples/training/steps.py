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
from agent_optax import layers
from agent_optax.typing import Topology
from training.augmentation import augment
from training.config import Config
from training.network import Variables, as_pixels
from training.objective import Objective

FIXED_BATCHES, ORDER, REFRESH, STEP, REWIRE = range(5)  # what a key is used for


class TrainState(NamedTuple):
    """Everything that a run goes on from."""

    params: Any
    variables: Variables
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
    initial_variables: Variables
    topology: Topology | None  # of sparse layers; None where the optimizer has it, or nothing changes

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch; a last batch that is not full is left out."""
        return self.num_images // self.config.batch_size

    @functools.partial(jax.jit, static_argnums=0)
    def start(self, params: Any, key: jax.Array) -> TrainState:
        """The state before the first step, with exactly sparse parameters."""
        opt_state = self.optimizer.init(params)
        if self.config.topology.name != "dense" and self.config.topology.layers == "dense":
            params = agent_optax.mask_params(params, opt_state)
        names = ["loss", "num_right"]
        if self.config.correction.memory != "none":
            names += ["correlation", "correction_weight"]
        variables = self.initial_variables
        if self.topology is not None:
            connections = layers.prepare_rewiring(params, variables.connections, opt_state)
            variables = variables._replace(connections=connections)
        zero = jnp.zeros((), jnp.int32)
        sums = {name: jnp.zeros(()) for name in names}
        return TrainState(params, variables, opt_state, key, zero, zero, sums)

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

        def loss_fn(params: Any, batch: tuple[jax.Array, jax.Array], connections: Any) -> jax.Array:
            rows, key = batch
            return self._refresh_loss(params, (images[rows], labels[rows], key), connections)

        batches = indices, self._refresh_keys(state, len(indices))
        return self._refreshed(loss_fn, state, batches)

    def refresh_from_host(self, state: TrainState, data: LabelledImages, indices: np.ndarray) -> TrainState:
        """The same, with one batch at a time on the device."""
        keys = self._refresh_keys(state, len(indices))
        batches = (
            (jnp.asarray(data.images[rows]), jnp.asarray(data.labels[rows]), keys[i]) for i, rows in enumerate(indices)
        )
        return self._refreshed(self._refresh_loss, state, batches)

    def _refreshed(self, loss_fn: Any, state: TrainState, batches: Any) -> TrainState:
        args = (state.variables.connections,)
        return state._replace(opt_state=agent_optax.refresh(loss_fn, state.params, state.opt_state, batches, args=args))

    def rewire(self, state: TrainState, images: jax.Array, labels: jax.Array) -> TrainState:
        """The topology update of sparse layers after a step that took this batch, if one is due."""
        step = int(state.epoch) * self.per_epoch + int(state.epoch_step)
        if self.topology is None or not self.topology.is_due(step):
            return state
        batch_key, key = jax.random.split(_fold(state.key, state.epoch, REWIRE, state.epoch_step))
        params, connections, opt_state, *_ = layers.rewire(
            self._rewire_loss,
            state.params,
            state.variables.connections,
            state.opt_state,
            self._batch(state.params, state.variables, jnp.asarray(images), jnp.asarray(labels), batch_key),
            tx=self.optimizer,
            topology=self.topology,
            step=step,
            key=key,
            args=(state.variables.batch_stats,),
            candidates=self.config.topology.candidates,
        )
        variables = state.variables._replace(connections=connections)
        return state._replace(params=params, opt_state=opt_state, variables=variables)

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def take(self, state: TrainState, images: jax.Array, labels: jax.Array, order: Order) -> TrainState:
        """One step for each row of `order`."""
        grads_fn = agent_optax.value_and_grads(self.objective.loss, has_aux=True)

        def step(state: TrainState, order: Order) -> tuple[TrainState, None]:
            params, variables, opt_state = state.params, state.variables, state.opt_state
            key = _fold(state.key, state.epoch, STEP, state.epoch_step)
            batch = self._batch(params, variables, images[order.indices], labels[order.indices], key)
            # The statistics come from the evaluation at the current weights; those at the old ones are dropped.
            ((loss, (variables, num_right)), grads), extras = grads_fn(params, opt_state, variables, batch)
            if self.config.correction.has_fixed_batches:
                extras["batch_index"] = order.batch_index
            updates, opt_state = self.optimizer.update(grads, opt_state, params, **extras)
            measured = {"loss": loss, "num_right": num_right}
            if self.config.correction.memory != "none":
                measured |= agent_optax.diagnostics(opt_state)
            return state._replace(
                params=optax.apply_updates(params, updates),
                variables=variables,
                opt_state=opt_state,
                epoch_step=state.epoch_step + 1,
                sums={name: total + measured[name] for name, total in state.sums.items()},
            ), None

        return jax.lax.scan(step, state, order)[0]

    @functools.partial(jax.jit, static_argnums=0, inline=True)
    def _batch(
        self, params: Any, variables: Variables, images: jax.Array, labels: jax.Array, key: jax.Array
    ) -> dict[str, jax.Array]:
        """Augmented, and attacked where training is adversarial."""
        augment_key, attack_key = jax.random.split(key)
        return self.objective.prepare(params, variables, self._augmented(augment_key, images), labels, attack_key)

    def _augmented(self, key: jax.Array, images: jax.Array) -> jax.Array:
        return as_pixels(augment(key, images, shift=self.config.data.shift, flip=self.config.data.flip))

    def _refresh_loss(self, params: Any, batch: tuple[jax.Array, jax.Array, jax.Array], connections: Any) -> jax.Array:
        images, labels, key = batch
        batch = {"images": self._augmented(key, images), "labels": labels}
        variables = self.initial_variables._replace(connections=connections)
        return self.objective.natural_loss(params, variables, batch)

    def _rewire_loss(self, params: Any, batch: dict, connections: Any, batch_stats: Any) -> jax.Array:
        loss, _ = self.objective.loss(params, Variables(batch_stats, connections), batch)
        return loss

    def _refresh_keys(self, state: TrainState, count: int) -> jax.Array:
        return jax.random.split(_fold(state.key, state.epoch, REFRESH), count)


def _fold(key: jax.Array, *numbers: jax.typing.ArrayLike) -> jax.Array:
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key
