"""Adversarial objectives: attacks, losses that train against them, and accuracy under them.

An attack is a function `attack(params, inputs, labels, key) -> inputs` that is built once, from a
loss or a model and a radius; it is pure, so it can be jitted, mapped and used inside a loss:

    attack = pgd(cross_entropy(logits_fn), epsilon=8 / 255, step_size=2 / 255, num_steps=10)

    def loss_fn(params, batch):
        attacked = attack(params, batch["image"], batch["label"], batch["key"])
        return cross_entropy(logits_fn)(params, attacked, batch["label"]).mean()
"""

from agent_optax.adversarial._attack import Attack, IterativeAttack
from agent_optax.adversarial._cross_entropy import cross_entropy
from agent_optax.adversarial._fgsm import fgsm
from agent_optax.adversarial._mart import mart_attack, mart_loss
from agent_optax.adversarial._mixed import mixed_attack
from agent_optax.adversarial._pgd import pgd
from agent_optax.adversarial._robust_accuracy import robust_accuracy
from agent_optax.adversarial._trades import trades_attack, trades_loss

__all__ = [
    # attacks
    "Attack",
    "IterativeAttack",
    "fgsm",
    "pgd",
    "trades_attack",
    "mart_attack",
    "mixed_attack",
    # losses
    "cross_entropy",
    "trades_loss",
    "mart_loss",
    # evaluation
    "robust_accuracy",
]
