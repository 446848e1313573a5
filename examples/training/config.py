"""What a training run is, as typed configuration: every field is a flag of `train.py`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import loaders
import models

MEMORIES_OF_FIXED_BATCHES = ("cached_snapshot", "table")
MEMORIES_WITH_REFRESH = ("snapshot", "cached_snapshot")


def check(condition: bool, message: str) -> None:
    """Raises ValueError with this message unless the condition holds."""
    if not condition:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    name: loaders.Name = "digits"
    data_dir: Path | None = None
    """Folder with the files of the data set, as its authors publish them."""
    from_hub: bool = False
    """Download with Hugging Face `datasets`, once, instead."""
    image_size: int | None = None
    """Pixels a side: images of a folder are resized to it (default 224), others padded with zeros."""
    num_train: int | None = None
    """Only the first so many training images."""
    shift: int = 4
    """Images are padded by so many pixels and cropped at random; 0 for none."""
    flip: bool = True
    """Whether images are mirrored at random."""
    placement: Literal["device", "host"] = "device"
    """Where images wait: on the device, so that an epoch is one scan; or on the host, a few batches at a time."""

    def __post_init__(self) -> None:
        is_folder = self.name == "image_folder"
        check(self.shift >= 0, f"--data.shift must not be negative, got {self.shift}.")
        check(
            not (self.from_hub and (is_folder or self.name == "digits")),
            f"--data.from-hub is of no use to {self.name}: leave it out.",
        )
        check(
            not (self.from_hub and self.data_dir is not None),
            f"--data.from-hub and --data.data-dir {self.data_dir} are two sources: leave one out.",
        )
        check(
            not (self.name == "digits" and self.data_dir is not None),
            f"digits come with scikit-learn and need no --data.data-dir {self.data_dir}: leave it out.",
        )
        check(
            not (is_folder and self.placement == "device"),
            "image_folder is decoded on demand, from the host: add --data.placement host.",
        )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    name: models.Name = "mlp"
    width: float = 1.0
    """Multiplies the channels of every convolution."""
    hidden: tuple[int, ...] = (300, 100)
    """Units of the hidden layers of an MLP."""
    stem: Literal["cifar", "imagenet"] = "cifar"
    """How a ResNet begins: a 3 x 3 convolution, or 7 x 7 with pooling for large images."""

    def __post_init__(self) -> None:
        check(self.width > 0, f"--model.width must be positive, got {self.width}.")
        check(
            self.stem == "cifar" or self.name in ("resnet-18", "resnet-34", "resnet-50"),
            f"--model.stem {self.stem} is for ResNets, not for {self.name}: leave it out.",
        )


@dataclasses.dataclass(frozen=True)
class TopologyConfig:
    name: Literal[
        "dense", "static", "set", "rigl", "set_itop", "rigl_itop", "snfs", "bayesian_rewiring", "gradual_pruning"
    ] = "set_itop"
    """Which weights are active; "dense": all, always."""
    sparsity: float = 0.9
    distribution: Literal["erk", "erdos_renyi", "uniform"] = "erk"
    """How layers share it."""
    update_every: int | None = None
    """Steps between topology updates. Default: 1500 for ITOP, 100 otherwise."""
    drop_fraction: float | None = None
    """Share of the active weights that is replaced. Default: 0.3, 0.5 for snfs, 0 for gradual_pruning; ITOP has a
    schedule."""
    storage: Literal["dense", "compact"] = "dense"
    """Whether the optimizer's state holds all weights, or the active ones only."""
    grow_by: Literal["raw", "corrected"] = "raw"
    """The gradient by which RigL grows."""
    stagger: bool = False
    """Whether layers change at different steps."""
    layers: Literal["dense", "sparse"] = "dense"
    """Dense kernels with zeros in them, or sparse layers, which hold and multiply only the weights that exist."""
    group: int | None = None
    """Of sparse layers: consecutive outputs that share their inputs. Default: 16."""
    candidates: float | None = None
    """Of sparse layers: how many weights may grow, drawn at random, over those that exist. Default: all may grow."""

    def __post_init__(self) -> None:
        check(
            self.name in ("set", "rigl", "snfs", "gradual_pruning") or self.drop_fraction is None,
            f"--topology.drop-fraction {self.drop_fraction} is of no use to {self.name}: leave it out.",
        )
        check(
            self.name not in ("dense", "static", "bayesian_rewiring") or self.update_every is None,
            f"--topology.update-every {self.update_every} is of no use to {self.name}, which changes "
            + ("at every step." if self.name == "bayesian_rewiring" else "never."),
        )
        check(
            self.name != "dense" or self.storage == "dense",
            "--topology.storage compact holds active weights only, and with --topology.name dense all are active.",
        )
        check(
            self.storage == "dense" or self.name not in ("snfs", "bayesian_rewiring", "gradual_pruning"),
            f"--topology.storage compact needs layers that keep their size, and {self.name} changes it: leave it out.",
        )
        check(
            self.grow_by == "raw" or self.name in ("rigl", "rigl_itop"),
            f"--topology.grow-by {self.grow_by} is for rigl and rigl_itop: {self.name} does not grow by gradients.",
        )
        check(
            self.layers == "dense" or self.name in ("static", "set", "rigl", "set_itop", "rigl_itop"),
            f"--topology.layers sparse is for static, set, rigl, set_itop and rigl_itop, not for {self.name}.",
        )
        check(
            self.layers == "dense" or (self.storage == "dense" and self.grow_by == "raw" and not self.stagger),
            "--topology.layers sparse takes no --topology.storage, --topology.grow-by and --topology.stagger: leave "
            "them out.",
        )
        check(
            self.layers == "sparse" or self.group is None,
            f"--topology.group {self.group} is for --topology.layers sparse: leave it out.",
        )
        check(
            self.candidates is None or (self.layers == "sparse" and self.name != "static" and self.candidates > 0),
            f"--topology.candidates {self.candidates} must be positive, and is for topologies of --topology.layers "
            "sparse that change: leave it out.",
        )
        check(
            self.grow_by == "raw" or self.storage == "dense",
            "--topology.grow-by corrected needs gradients that --topology.storage compact does not hold.",
        )


@dataclasses.dataclass(frozen=True)
class CorrectionConfig:
    memory: Literal["none", "snapshot", "cached_snapshot", "recursion", "table", "history"] = "snapshot"
    """Where the old gradient comes from; "none": plain SGD."""
    coefficient: Literal["loss_regression", "gradient_regression", "constant", "scheduled"] = "gradient_regression"
    """How much of it is used; "scheduled" is the linear decay of alpha-SVRG, from `initial` to 0."""
    scaling: float | None = None
    """Default: 0.1 for loss_regression (the paper), 1 otherwise."""
    smoothing: float = 0.3
    """Of loss_regression: the weight of the newest estimate."""
    initial: float | None = None
    """The constant (default 1), the start of the schedule (default 0.75) or of loss_regression (default 0)."""
    refresh_batches: int | None = None
    """Batches of a refresh pass. Default: all of an epoch; fewer are cheaper and worse."""

    def __post_init__(self) -> None:
        check(
            self.refresh_batches is None or self.memory == "snapshot",
            f"--correction.refresh-batches {self.refresh_batches} is for snapshot; {self.memory} "
            + ("needs all of them." if self.memory == "cached_snapshot" else "has no refresh pass."),
        )
        check(
            self.initial is None or self.coefficient != "gradient_regression",
            f"--correction.initial {self.initial} is of no use to gradient_regression, which starts at 1.",
        )

    @property
    def has_refresh(self) -> bool:
        """Whether an epoch begins with a pass over the data."""
        return self.memory in MEMORIES_WITH_REFRESH

    @property
    def has_fixed_batches(self) -> bool:
        """Whether batches must be the same in each epoch, in any order."""
        return self.memory in MEMORIES_OF_FIXED_BATCHES


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    name: Literal["natural", "at", "trades", "mart"] = "natural"
    epsilon: float = 8 / 255
    step_size: float = 2 / 255
    num_steps: int = 10
    """Steps of the attack in training."""
    beta: float = 6.0
    """Of TRADES and MART: the weight of the divergence."""
    attacked_fraction: float = 1.0
    """Of adversarial training (at): the share of a batch that is attacked."""
    robust_images: int = 0
    """Test images on which robust accuracy is measured, once training has ended. 0: none; the paper takes all."""
    robust_steps: int = 50
    robust_restarts: int = 10

    def __post_init__(self) -> None:
        check(
            self.attacked_fraction == 1 or self.name == "at",
            f"--objective.attacked-fraction {self.attacked_fraction} is for at: {self.name} has its own mixture.",
        )
        check(self.robust_images >= 0, f"--objective.robust-images must not be negative, got {self.robust_images}.")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    decoupled: bool = False
    """Whether weights decay beside the momentum (SGDW) and not through it."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """Shares of training after which the learning rate falls."""
    decays: tuple[float, ...] = (0.1, 0.01)
    """What the first learning rate is multiplied with after each of them."""

    def __post_init__(self) -> None:
        inside = all(0 < share < 1 for share in self.milestones)
        check(
            len(self.milestones) == len(self.decays) and all(decay > 0 for decay in self.decays),
            f"--optimizer.decays needs a positive number for each of --optimizer.milestones {self.milestones}, got "
            f"{self.decays}.",
        )
        check(inside, f"--optimizer.milestones are shares of training, between 0 and 1, got {self.milestones}.")


@dataclasses.dataclass(frozen=True)
class Config:
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    topology: TopologyConfig = TopologyConfig()
    correction: CorrectionConfig = CorrectionConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    epochs: int = 200
    batch_size: int = 128
    seed: int = 0
    """Of the initial weights, the masks, the order of the data, augmentation and attacks."""
    out: Path = Path("runs/default")
    """Folder of the run: checkpoints, metrics.csv, TensorBoard events, config.json, curves.png."""
    resume: bool = False
    """Go on from the last checkpoint in `out`, bit for bit."""
    checkpoint_every: int = 1
    """Epochs between checkpoints."""
    steps_per_call: int | None = None
    """Steps of one scan; Ctrl-C saves after it. Default: the whole epoch; 50 with --data.placement host."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "checkpoint_every"):
            check(getattr(self, name) >= 1, f"--{name.replace('_', '-')} must be 1 or more, got {getattr(self, name)}.")
        check(
            self.steps_per_call is None or self.steps_per_call >= 1,
            f"--steps-per-call must be 1 or more, got {self.steps_per_call}.",
        )
        is_random = self.data.shift > 0 or self.data.flip or self.objective.name != "natural"
        check(
            not (self.correction.memory == "cached_snapshot" and is_random),
            "--correction.memory cached_snapshot keeps the gradients of its refresh pass, so images must not change "
            "after it: add --data.shift 0 --data.no-flip --objective.name natural, or take snapshot.",
        )
