"""The paper's experiments by name: what it trains, with its settings.

A name is the method, the network, the data and the sparsity in percent. `set-itop`, `rigl-itop` and `bsr-net` are the
paper's baselines; with `a-` before them their gradients are corrected by AGENT as published. BSR-Net is trained on
clean images or on attacked ones (AT with PGD-10). A flag changes any setting.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

from training.config import (
    Config,
    CorrectionConfig,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TopologyConfig,
)

AGENT = CorrectionConfig(memory="snapshot", coefficient="loss_regression", scaling=0.1, smoothing=0.3)
PLAIN = CorrectionConfig(memory="none")
IMAGENET_REFRESH = 391  # batches of 128: the paper's sub-sample of 50,000 of 1.28 million images

TOPOLOGIES = {
    "set-itop": TopologyConfig(name="set_itop", update_every=1500),
    "rigl-itop": TopologyConfig(name="rigl_itop", update_every=4000),  # the interval of the authors of ITOP on CIFAR
}
DATA = {
    "cifar10": DataConfig(name="cifar10"),
    "cifar100": DataConfig(name="cifar100"),
    "svhn": DataConfig(name="svhn", flip=False),  # a mirrored digit is another
}
NATURAL = [
    ("vgg-c", "cifar10"),
    ("vgg-c", "cifar100"),
    ("resnet-34", "cifar10"),
    ("resnet-34", "cifar100"),
    ("resnet-50", "cifar10"),
]
SPARSITIES = (80, 90, 95, 99)
BSR_NET = [("vgg-16", "cifar10"), ("vgg-16", "svhn"), ("wide-resnet-28-4", "cifar10"), ("resnet-18", "cifar10")]
BSR_NET_SPARSITIES = (90, 99)
BSR_NET_OPTIMIZER = OptimizerConfig(decoupled=True, milestones=(0.25, 0.5), decays=(0.1, 0.005))
OBJECTIVES = {"natural": ObjectiveConfig(), "adversarial": ObjectiveConfig(name="at", robust_images=10_000)}
DIGITS = Config(
    data=DataConfig(name="digits", shift=0, flip=False),
    topology=TopologyConfig(name="set_itop", sparsity=0.97, update_every=40),
    epochs=30,
    batch_size=32,
    out=Path("runs/digits"),
)


def presets() -> dict[str, tuple[str, Config]]:
    """A description and the configuration for each name."""
    named = {
        "digits": ("An MLP on scikit-learn's digits, gradient regression: a minute, nothing to download.", DIGITS),
        "fashion-mnist": (
            "The same on Fashion-MNIST, 99% sparse.",
            dataclasses.replace(
                DIGITS,
                data=DataConfig(name="fashion_mnist", shift=0, flip=False),
                topology=TopologyConfig(name="set_itop", sparsity=0.99, update_every=300),
                out=Path("runs/fashion-mnist"),
            ),
        ),
    }
    for prefix, correction in (("", PLAIN), ("a-", AGENT)):
        whose = "corrected by AGENT" if prefix else "plain SGD"
        for method, (model, data), percent in itertools.product(TOPOLOGIES, NATURAL, SPARSITIES):
            name = f"{prefix}{method}-{model}-{data}-{percent}"
            config = Config(
                data=DATA[data],
                model=ModelConfig(name=model),
                topology=dataclasses.replace(TOPOLOGIES[method], sparsity=percent / 100),
                correction=correction,
                epochs=250,
                out=Path("runs") / name,
            )
            named[name] = (f"{method}, {percent}% sparse, {model} on {data}, {whose}.", config)
        for (model, data), percent, kind in itertools.product(BSR_NET, BSR_NET_SPARSITIES, OBJECTIVES):
            name = f"{prefix}bsr-net-{model}-{data}-{percent}-{kind}"
            config = Config(
                data=DATA[data],
                model=ModelConfig(name=model),
                topology=TopologyConfig(name="bayesian_rewiring", sparsity=percent / 100),
                correction=correction,
                objective=OBJECTIVES[kind],
                optimizer=BSR_NET_OPTIMIZER,
                epochs=200,
                out=Path("runs") / name,
            )
            named[name] = (f"BSR-Net, {kind} training, {percent}% sparse, {model} on {data}, {whose}.", config)
        for method in TOPOLOGIES:
            name = f"{prefix}{method}-resnet-50-imagenet-90"
            config = Config(
                data=DataConfig(name="image_folder", placement="host"),
                model=ModelConfig(name="resnet-50", stem="imagenet"),
                topology=dataclasses.replace(TOPOLOGIES[method], sparsity=0.9),
                correction=dataclasses.replace(correction, refresh_batches=IMAGENET_REFRESH if prefix else None),
                epochs=100,
                out=Path("runs") / name,
            )
            named[name] = (f"{method}, 90% sparse, ResNet-50 on a folder of ImageNet, {whose}.", config)
    return named
