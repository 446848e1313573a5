"""What is minimised: the cross-entropy on clean images, on attacked ones (AT), TRADES or MART."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from agent_optax import adversarial
from training.config import ObjectiveConfig
from training.network import Network


@dataclasses.dataclass(frozen=True)
class Objective:
    """An attack, and the loss on a batch that it has prepared."""

    network: Network
    attack: adversarial.Attack | None
    uses_clean: bool  # whether the loss wants logits on clean images
    combine: Callable[[jax.Array | None, jax.Array | None, jax.Array], jax.Array]  # clean, attacked logits; labels

    def prepare(self, params: Any, variables: Any, images: jax.Array, labels: jax.Array, key: jax.Array) -> dict:
        """The batch with its attacked images, made once, at the current weights and in evaluation mode.

        The old gradient is taken on the same attacked images, as in the paper.
        """
        batch = {"images": images, "labels": labels}
        if self.attack is not None:
            batch["attacked"] = self.attack((params, variables), images, labels, key)
        return batch

    def loss(self, params: Any, variables: Any, batch: dict) -> tuple[jax.Array, tuple[Any, jax.Array]]:
        """The loss, and as auxiliary output the new statistics and how many labels were right."""
        clean = attacked = None
        if self.uses_clean:
            clean, variables = self.network.training_logits(params, variables, batch["images"])
        if self.attack is not None:
            attacked, variables = self.network.training_logits(params, variables, batch["attacked"])
        logits = attacked if clean is None else clean
        num_right = jnp.sum(jnp.argmax(logits, axis=-1) == batch["labels"]).astype(jnp.float32)
        return self.combine(clean, attacked, batch["labels"]), (variables, num_right)

    def natural_loss(self, params: Any, variables: Any, batch: dict) -> jax.Array:
        """The cross-entropy on clean images, for refresh passes: the mean gradient of the paper is not attacked.

        It does not depend on the running statistics, and its own are dropped: the live network never sees them.
        """
        logits, _ = self.network.training_logits(params, variables, batch["images"])
        return mean_cross_entropy(logits, batch["labels"])


def build_objective(config: ObjectiveConfig, network: Network) -> Objective:
    """The objective that the configuration names."""

    def logits_fn(params_and_stats: tuple[Any, Any], images: jax.Array) -> jax.Array:
        return network.evaluation_logits(*params_and_stats, images)

    ball = {"epsilon": config.epsilon, "step_size": config.step_size, "num_steps": config.num_steps}
    match config.name:
        case "natural":
            return Objective(network, None, True, lambda clean, _, labels: mean_cross_entropy(clean, labels))
        case "at":
            attack = adversarial.pgd(adversarial.cross_entropy(logits_fn), **ball)
            attack = adversarial.mixed_attack(attack, fraction=config.attacked_fraction)
            return Objective(network, attack, False, lambda _, attacked, labels: mean_cross_entropy(attacked, labels))
        case "trades":
            attack = adversarial.trades_attack(logits_fn, **ball)
            return Objective(network, attack, True, lambda *logits: adversarial.trades_loss(*logits, config.beta))
        case "mart":
            attack = adversarial.mart_attack(logits_fn, **ball)
            return Objective(network, attack, True, lambda *logits: adversarial.mart_loss(*logits, config.beta))
    raise ValueError(f"there is no objective {config.name!r}.")


def mean_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(adversarial.cross_entropy(lambda logits, _: logits)(logits, None, labels))


def robust_accuracy(config: ObjectiveConfig, network: Network) -> Callable[..., jax.Array]:
    """A function of parameters, statistics, images, labels and key: accuracy under PGD, as the paper evaluates it."""

    def logits_fn(params_and_stats: tuple[Any, Any], images: jax.Array) -> jax.Array:
        return network.evaluation_logits(*params_and_stats, images)

    attack = adversarial.pgd(
        adversarial.cross_entropy(logits_fn),
        epsilon=config.epsilon,
        step_size=config.step_size,
        num_steps=config.robust_steps,
    )

    @jax.jit
    def evaluate(params: Any, variables: Any, images: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
        return adversarial.robust_accuracy(
            logits_fn,
            (params, variables),
            images,
            labels,
            key=key,
            attack=attack,
            restarts=config.robust_restarts,
        )

    return evaluate
