"""The VGG networks of sparse training on CIFAR: VGG-16 with one linear layer, and VGG-C."""

from __future__ import annotations

import jax
from flax import nnx

# (kernel size, channels) of the convolutions between two poolings.
STAGES = {
    "vgg-16": [
        [(3, 64)] * 2,
        [(3, 128)] * 2,
        [(3, 256)] * 3,
        [(3, 512)] * 3,
        [(3, 512)] * 3,
    ],
    "vgg-c": [
        [(3, 64)] * 2,
        [(3, 128)] * 2,
        [(3, 256), (3, 256), (1, 256)],
        [(3, 512), (3, 512), (1, 512)],
        [(3, 512), (3, 512), (1, 512)],
    ],
}
HEAD = {"vgg-16": (), "vgg-c": (512, 512)}  # hidden units after the convolutions
SMALLEST = 32  # pixels a side that five poolings by two need


class VGG(nnx.Module):
    """Stages of convolution, BatchNorm, ReLU, each ended by a pooling; then the mean over positions and the head."""

    def __init__(
        self, name: str, image_shape: tuple[int, int, int], num_classes: int, *, width: float = 1.0, rngs: nnx.Rngs
    ) -> None:
        height, breadth, channels = image_shape
        if min(height, breadth) < SMALLEST:
            raise ValueError(
                f"{name} halves its images five times and needs {SMALLEST} x {SMALLEST} pixels, got {height} x "
                f"{breadth}: pad them with --data.image-size {SMALLEST}, or take an MLP or a ResNet."
            )
        if width * 64 < 1:
            raise ValueError(f"width {width} leaves no channel of 64: take 1/64 or more.")
        he_normal = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
        self.stages = nnx.List()
        for stage in STAGES[name]:
            layers = nnx.List()
            for kernel, full in stage:
                features = round(width * full)
                layers.append(nnx.Conv(channels, features, (kernel, kernel), kernel_init=he_normal, rngs=rngs))
                layers.append(nnx.BatchNorm(features, momentum=0.9, rngs=rngs))
                channels = features
            self.stages.append(layers)
        self.head = nnx.List()
        for full in HEAD[name]:
            features = round(width * full)
            self.head.append(nnx.Linear(channels, features, rngs=rngs))
            self.head.append(nnx.BatchNorm(features, momentum=0.9, rngs=rngs))
            channels = features
        self.classifier = nnx.Linear(channels, num_classes, rngs=rngs)

    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        x = images
        for stage in self.stages:
            for convolution, norm in zip(stage[::2], stage[1::2], strict=True):
                x = nnx.relu(norm(convolution(x), use_running_average=not train))
            x = nnx.max_pool(x, (2, 2), strides=(2, 2))
        x = x.mean(axis=(1, 2))
        for linear, norm in zip(self.head[::2], self.head[1::2], strict=True):
            x = norm(nnx.relu(linear(x)), use_running_average=not train)  # in place of VGG's dropout
        return self.classifier(x)
