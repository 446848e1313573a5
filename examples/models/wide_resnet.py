"""Wide residual networks, with normalisation before each convolution."""

from __future__ import annotations

import jax
from flax import nnx

HE_NORMAL = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, *, rngs: nnx.Rngs) -> nnx.Conv:
    padding = [(kernel // 2, kernel // 2)] * 2
    return nnx.Conv(
        inputs, outputs, (kernel, kernel), stride, padding=padding, use_bias=False, kernel_init=HE_NORMAL, rngs=rngs
    )


class WideBlock(nnx.Module):
    """BatchNorm, ReLU, convolution, twice, added to the input; a projection starts after the first ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, rngs: nnx.Rngs) -> None:
        self.norm1 = nnx.BatchNorm(inputs, momentum=0.9, rngs=rngs)
        self.conv1 = convolution(inputs, outputs, 3, stride, rngs=rngs)
        self.norm2 = nnx.BatchNorm(outputs, momentum=0.9, rngs=rngs)
        self.conv2 = convolution(outputs, outputs, 3, rngs=rngs)
        is_same = inputs == outputs and stride == 1
        self.shortcut = None if is_same else convolution(inputs, outputs, 1, stride, rngs=rngs)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = nnx.relu(self.norm1(x, use_running_average=not train))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        y = nnx.relu(self.norm2(self.conv1(y), use_running_average=not train))
        return self.conv2(y) + shortcut


class WideResNet(nnx.Module):
    """WRN-depth-widen: three stages of (depth - 4) / 6 blocks with 16, 32 and 64 times `widen` channels."""

    def __init__(self, depth: int, widen: float, channels: int, num_classes: int, *, rngs: nnx.Rngs) -> None:
        if (depth - 4) % 6 or depth < 10:
            raise ValueError(f"the depth of a wide ResNet is 4 + 6n, such as 28, got {depth}.")
        if 16 * widen < 1:
            raise ValueError(f"widening by {widen} leaves no channel of 16: take 1/16 or more.")
        self.stem = convolution(channels, 16, 3, rngs=rngs)
        self.blocks = nnx.List()
        features = 16
        for stage in range(3):
            outputs = round(16 * 2**stage * widen)
            for index in range((depth - 4) // 6):
                self.blocks.append(WideBlock(features, outputs, 2 if stage and not index else 1, rngs=rngs))
                features = outputs
        self.norm = nnx.BatchNorm(features, momentum=0.9, rngs=rngs)
        self.classifier = nnx.Linear(features, num_classes, rngs=rngs)

    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        x = self.stem(images)
        for block in self.blocks:
            x = block(x, train)
        x = nnx.relu(self.norm(x, use_running_average=not train))
        return self.classifier(x.mean(axis=(1, 2)))
