"""What a loader returns: images as bytes, their classes, split into a training and a test set."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class LabelledImages(NamedTuple):
    """Images and their classes."""

    images: Any  # uint8 [N, H, W, C]: an array, or what decodes `images[indices]` on demand
    labels: np.ndarray  # int32 [N]

    @property
    def is_in_memory(self) -> bool:
        """Whether the images are an array, and no files to decode."""
        return isinstance(self.images, np.ndarray)

    def first(self, count: int | None) -> LabelledImages:
        """Only the first so many; all for None."""
        if count is None:
            return self
        if not 1 <= count <= len(self.labels):
            raise ValueError(
                f"--data.num-train must be from 1 to the {len(self.labels)} images there are, got {count}."
            )
        return LabelledImages(self.images[:count], self.labels[:count])


class DataSet(NamedTuple):
    """A training set and a test set."""

    train: LabelledImages
    test: LabelledImages
    num_classes: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        return tuple(self.train.images.shape[1:])

    def pixel_statistics(self, most: int = 10_000) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each channel [C], pixels being in [0, 1].

        Args:
            most: images that are measured, evenly spread over the training set; in float64, so that their sum is exact.
        """
        count = len(self.train.labels)
        pixels = self.train.images[np.linspace(0, count - 1, min(count, most)).astype(np.int64)]
        pixels = pixels.reshape(-1, pixels.shape[-1]).astype(np.float64) / 255
        return pixels.mean(axis=0).astype(np.float32), np.maximum(pixels.std(axis=0), 1e-3).astype(np.float32)


def pad_to(data: DataSet, image_size: int) -> DataSet:
    """Images with zeros around them, `image_size` pixels a side."""
    height, width, _ = data.image_shape
    if image_size < max(height, width):
        raise ValueError(
            f"--data.image-size {image_size} is less than the {height} x {width} pixels there are, and images are "
            "padded, not shrunk: leave it out."
        )
    top, left = (image_size - height) // 2, (image_size - width) // 2
    border = ((0, 0), (top, image_size - height - top), (left, image_size - width - left), (0, 0))
    train, test = (split._replace(images=np.pad(split.images, border)) for split in (data.train, data.test))
    return data._replace(train=train, test=test)


def check_labels(where: Any, images: Any, labels: np.ndarray, num_classes: int) -> None:
    """Raises ValueError unless there is a class for each image, below `num_classes`."""
    if len(images) != len(labels):
        raise ValueError(f"{where} holds {len(images)} images and {len(labels)} labels: get it anew.")
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= num_classes:
        held = f"labels from {labels.min()} to {labels.max()}" if len(labels) else "no image"
        raise ValueError(f"{where} holds {held}, where {num_classes} classes are expected: is it another data set?")
