"""What all methods of a comparison share: data, network, sparsity, optimizer settings, length."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import optax

import agent_optax
from convergence import images

DROP_FRACTION, FINAL_DROP_FRACTION = 0.5, 0.005  # ITOP's


@dataclasses.dataclass(frozen=True)
class Setting:
    """The default is R9: a 99% sparse network on 10,000 images, ten epochs at a constant rate."""

    dataset: str = "fashion_mnist"
    num_train: int | None = 10_000
    num_test: int | None = None
    hidden: tuple[int, ...] = (300, 100)
    sparsity: float = 0.99
    topology: Literal["set", "rigl", "static", "dense"] = "set"  # "dense": no weight is pruned
    batch_size: int = 32
    learning_rate: float = 0.1
    decays: bool = False  # the rate, to a tenth at half and again at three quarters of the epochs, as in the paper
    weight_decay: float = 5e-4
    epochs: int = 10
    attack_epsilon: float = 0.0  # of the attack in training, in pixels of [0, 1]; 0 for none
    attack_steps: int = 5
    averages: bool = False  # whether a weight average is evaluated too
    probes: bool = False  # whether gradients are measured at the end of each epoch; wants a snapshot

    @property
    def subset(self) -> tuple[str, int | None, int | None]:
        """Which images, as `images.load` takes it."""
        return self.dataset, self.num_train, self.num_test

    @property
    def images(self) -> images.Images:
        """The data."""
        return images.load(*self.subset)

    @property
    def steps_an_epoch(self) -> int:
        """Even, so that an epoch has two equal halves; samples that fill no batch are left out."""
        return len(self.images.train_images) // self.batch_size // 2 * 2

    @property
    def total_steps(self) -> int:
        """Of a run."""
        return self.epochs * self.steps_an_epoch

    def rate(self, factor: float = 1.0) -> optax.ScalarOrSchedule:
        """The learning rate times `factor`."""
        start = self.learning_rate * factor
        if not self.decays:
            return start
        return optax.piecewise_constant_schedule(start, {self.total_steps // 2: 0.1, self.total_steps * 3 // 4: 0.1})

    def momentum_sgd(self, rate_factor: float = 1.0) -> optax.GradientTransformation:
        """The paper's SGD: coupled weight decay, Nesterov momentum."""
        return optax.chain(
            optax.add_decayed_weights(self.weight_decay), optax.sgd(self.rate(rate_factor), momentum=0.9, nesterov=True)
        )

    def sparsified(
        self,
        inner: optax.GradientTransformation,
        key: Any,
        masks: Any = None,
        storage: Literal["dense", "compact"] = "dense",
        pattern: Any = None,
    ) -> optax.GradientTransformationExtraArgs:
        """The optimizer of dense kernels."""
        if self.topology == "dense":
            return optax.with_extra_args_support(inner)
        topology = self.topology_updates()
        return agent_optax.sparsify(
            inner, topology, sparsity=self.sparsity, key=key, masks=masks, storage=storage, pattern=pattern
        )

    def topology_updates(self) -> agent_optax.typing.Topology:
        """One an epoch, in its middle, so that weights have settled when accuracy is measured."""
        interval = self.steps_an_epoch
        times = {"update_every": interval, "start": interval // 2}
        schedule = optax.cosine_decay_schedule(
            DROP_FRACTION, self.total_steps, alpha=FINAL_DROP_FRACTION / DROP_FRACTION
        )
        return {
            "set": lambda: agent_optax.set_(drop_fraction=schedule, **times),
            "rigl": lambda: agent_optax.rigl(drop_fraction=schedule, **times),
            "static": agent_optax.static,
        }[self.topology]()
