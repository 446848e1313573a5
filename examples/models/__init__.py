"""The networks of the paper, as Flax NNX modules called with `model(images [B, H, W, C], train) -> logits [B, K]`."""

from __future__ import annotations

from typing import Literal

from flax import nnx

from models.mlp import MLP
from models.resnet import ResNet
from models.vgg import VGG
from models.wide_resnet import WideResNet

Name = Literal["mlp", "vgg-c", "vgg-16", "resnet-18", "resnet-34", "resnet-50", "wide-resnet-28-4"]


def build(
    name: Name,
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    width: float = 1.0,
    hidden: tuple[int, ...] = (300, 100),
    stem: Literal["cifar", "imagenet"] = "cifar",
    rngs: nnx.Rngs,
) -> nnx.Module:
    """The network of this name.

    Args:
        name: which one.
        image_shape: height, width and channels of an image.
        num_classes: K.
        width: multiplies the channels of every convolution; 1 is the published network.
        hidden: units of the hidden layers of the MLP.
        stem: how a ResNet begins: a 3 x 3 convolution (images of about 32 pixels), or 7 x 7 and pooling.
        rngs: seeds the initial weights.

    Raises:
        ValueError: if the images are too small for the network, or the width leaves a layer without channels.
    """
    channels = image_shape[-1]
    match name:
        case "mlp":
            return MLP(image_shape, hidden, num_classes, rngs=rngs)
        case "vgg-c" | "vgg-16":
            return VGG(name, image_shape, num_classes, width=width, rngs=rngs)
        case "resnet-18" | "resnet-34" | "resnet-50":
            return ResNet(int(name.removeprefix("resnet-")), channels, num_classes, width=width, stem=stem, rngs=rngs)
        case "wide-resnet-28-4":
            return WideResNet(28, 4 * width, channels, num_classes, rngs=rngs)
    raise ValueError(f"there is no network {name!r}: take one of {', '.join(Name.__args__)}.")
