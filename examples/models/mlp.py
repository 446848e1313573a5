"""A multilayer perceptron with batch normalisation."""

from __future__ import annotations

import itertools
import math

import jax
from flax import nnx


class MLP(nnx.Module):
    """Linear, BatchNorm, ReLU for each hidden layer, then Linear; 300 and 100 hidden units are LeNet-300-100's."""

    def __init__(
        self, image_shape: tuple[int, int, int], hidden: tuple[int, ...], num_classes: int, *, rngs: nnx.Rngs
    ) -> None:
        if not all(units >= 1 for units in hidden):
            raise ValueError(f"hidden layers need one unit at least, got {hidden}.")
        sizes = itertools.pairwise((math.prod(image_shape), *hidden))
        he_normal = nnx.initializers.he_normal()
        self.linears = nnx.List([nnx.Linear(m, n, kernel_init=he_normal, rngs=rngs) for m, n in sizes])
        self.norms = nnx.List([nnx.BatchNorm(n, momentum=0.9, rngs=rngs) for n in hidden])
        self.head = nnx.Linear((math.prod(image_shape), *hidden)[-1], num_classes, rngs=rngs)

    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        x = images.reshape(len(images), -1)
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x = nnx.relu(norm(linear(x), use_running_average=not train))
        return self.head(x)
