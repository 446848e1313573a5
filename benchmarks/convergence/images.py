"""The images that the suites train on: Fashion-MNIST where it is installed, scikit-learn's digits elsewhere."""

from __future__ import annotations

import functools
import gzip
from pathlib import Path
from typing import NamedTuple

import numpy as np

FASHION_MNIST_DIR = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts it
IDX_HEADER = {"images": 16, "labels": 8}  # bytes


class Images(NamedTuple):
    """Standardised flat images and their labels."""

    train_images: np.ndarray  # float32 [N, D], mean 0 and standard deviation 1 over all pixels
    train_labels: np.ndarray  # int32 [N]
    test_images: np.ndarray  # float32 [M, D], with the same shift and scale
    test_labels: np.ndarray  # int32 [M]
    pixel_mean: float  # of pixels in [0, 1]
    pixel_deviation: float


def available(data_dir: Path = FASHION_MNIST_DIR) -> str:
    """The data set that a suite gets when none is asked for."""
    return "fashion_mnist" if (data_dir / "train-images-idx3-ubyte.gz").is_file() else "digits"


@functools.cache
def load(dataset: str, num_train: int | None = None, num_test: int | None = None) -> Images:
    """The first `num_train` images for training and the first `num_test` for tests; all by default."""
    readers = {"fashion_mnist": _fashion_mnist, "digits": _digits}
    if dataset not in readers:
        raise ValueError(f"dataset must be one of {', '.join(readers)}, got {dataset!r}.")
    train_images, train_labels, test_images, test_labels = readers[dataset]()
    train_images, test_images = train_images[:num_train], test_images[:num_test]
    mean, deviation = float(train_images.mean()), float(train_images.std())
    return Images(
        train_images=(train_images - mean) / deviation,
        train_labels=train_labels[:num_train].astype(np.int32),
        test_images=(test_images - mean) / deviation,
        test_labels=test_labels[:num_test].astype(np.int32),
        pixel_mean=mean,
        pixel_deviation=deviation,
    )


def _fashion_mnist() -> list[np.ndarray]:
    arrays = []
    for part in ("train", "t10k"):
        for kind, axes in (("images", 3), ("labels", 1)):
            path = FASHION_MNIST_DIR / f"{part}-{kind}-idx{axes}-ubyte.gz"
            if not path.is_file():
                raise FileNotFoundError(
                    f"{path} is missing: apt-get install dataset-fashion-mnist, or --dataset digits."
                )
            content = np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=IDX_HEADER[kind])
            arrays.append((content.reshape(-1, 784) / 255).astype(np.float32) if kind == "images" else content)
    return arrays


def _digits() -> list[np.ndarray]:
    import sklearn.datasets
    import sklearn.model_selection

    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    train_images, test_images, train_labels, test_labels = sklearn.model_selection.train_test_split(
        (images / 16).astype(np.float32), labels, test_size=500, stratify=labels, random_state=0
    )
    return [train_images, train_labels, test_images, test_labels]
