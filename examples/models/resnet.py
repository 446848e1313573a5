"""Residual networks: ResNet-18, 34 and 50, for images of about 32 pixels or for those of ImageNet."""

from __future__ import annotations

from typing import Literal

import jax
from flax import nnx

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
CHANNELS = (64, 128, 256, 512)
HE_NORMAL = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


class ConvNorm(nnx.Module):
    """A convolution without bias, padded as in PyTorch so that strides see the same pixels, and BatchNorm."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, *, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(
            inputs,
            outputs,
            (kernel, kernel),
            strides=stride,
            padding=[(kernel // 2, kernel // 2)] * 2,
            use_bias=False,
            kernel_init=HE_NORMAL,
            rngs=rngs,
        )
        self.norm = nnx.BatchNorm(outputs, momentum=0.9, rngs=rngs)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return self.norm(self.conv(x), use_running_average=not train)


class Residual(nnx.Module):
    """x + F(x), where F is a chain of convolutions with ReLU between them; x is projected where its shape changes."""

    def __init__(self, inputs: int, chain: list[tuple[int, int, int]], *, rngs: nnx.Rngs) -> None:
        """`chain` holds channels, kernel size and stride of each convolution."""
        self.chain = nnx.List()
        channels, total_stride = inputs, 1
        for outputs, kernel, stride in chain:
            self.chain.append(ConvNorm(channels, outputs, kernel, stride, rngs=rngs))
            channels, total_stride = outputs, total_stride * stride
        is_same = inputs == channels and total_stride == 1
        self.shortcut = None if is_same else ConvNorm(inputs, channels, 1, total_stride, rngs=rngs)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = x
        for index, layer in enumerate(self.chain):
            y = layer(nnx.relu(y) if index else y, train)
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x, train)))


class ResNet(nnx.Module):
    """A stem, four stages of residual blocks, the mean over positions, a linear layer."""

    def __init__(
        self,
        depth: int,
        channels: int,
        num_classes: int,
        *,
        width: float = 1.0,
        stem: Literal["cifar", "imagenet"] = "cifar",
        rngs: nnx.Rngs,
    ) -> None:
        stages = [round(width * full) for full in CHANNELS]
        if stages[0] < 1:
            raise ValueError(f"width {width} leaves no channel of {CHANNELS[0]}: take 1/{CHANNELS[0]} or more.")
        self.pools = stem == "imagenet"
        features = stages[0]
        self.stem = ConvNorm(channels, features, *((7, 2) if self.pools else (3, 1)), rngs=rngs)
        self.blocks = nnx.List()
        for stage, (outputs, count) in enumerate(zip(stages, BLOCKS[depth], strict=True)):
            for index in range(count):
                stride = 2 if stage and not index else 1
                if depth == 50:  # the bottleneck: the stride is that of its 3 x 3 convolution
                    chain = [(outputs, 1, 1), (outputs, 3, stride), (4 * outputs, 1, 1)]
                else:
                    chain = [(outputs, 3, stride), (outputs, 3, 1)]
                self.blocks.append(Residual(features, chain, rngs=rngs))
                features = chain[-1][0]
        self.classifier = nnx.Linear(features, num_classes, rngs=rngs)

    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        x = nnx.relu(self.stem(images, train))
        if self.pools:
            x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for block in self.blocks:
            x = block(x, train)
        return self.classifier(x.mean(axis=(1, 2)))
