"""The image data sets of the examples, as arrays of floats: nothing is downloaded."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import NamedTuple

import numpy as np

FASHION_MNIST_DIR = Path("/usr/share/datasets/fashion-mnist")  # where Debian and Ubuntu put it
FASHION_MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
IDX_UNSIGNED_BYTES = 8  # the third byte of an IDX file: its data type


class ImageData(NamedTuple):
    """Flat images and their labels, split into a training and a test set."""

    train_images: np.ndarray  # float32 [N, D], pixels in [0, 1]
    train_labels: np.ndarray  # int32 [N]
    test_images: np.ndarray  # float32 [M, D]
    test_labels: np.ndarray  # int32 [M]


def standardise(data: ImageData) -> ImageData:
    """Pixels shifted and scaled so that over the training images they have mean 0 and standard deviation 1."""
    mean, deviation = data.train_images.mean(), data.train_images.std()
    return data._replace(
        train_images=(data.train_images - mean) / deviation, test_images=(data.test_images - mean) / deviation
    )


def load_digits(num_test: int = 500) -> ImageData:
    """The 1,797 handwritten digits of 8 x 8 pixels in scikit-learn, split once and for all.

    Args:
        num_test: M, images held out, with the same share of each digit.
    """
    import sklearn.datasets
    import sklearn.model_selection

    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    split = sklearn.model_selection.train_test_split(
        (images / 16).astype(np.float32), labels.astype(np.int32), test_size=num_test, stratify=labels, random_state=0
    )
    return ImageData(train_images=split[0], train_labels=split[2], test_images=split[1], test_labels=split[3])


def load_fashion_mnist(data_dir: Path | None = None, num_train: int | None = None) -> ImageData:
    """Fashion-MNIST: 28 x 28 images of ten kinds of clothes, 60,000 for training and 10,000 for tests.

    Args:
        data_dir: the folder with the four IDX files, gzipped or not. Default: where Debian's package puts them. MNIST
            and its other relatives have files of the same names.
        num_train: N, only the first so many training images. Default: all.

    Raises:
        FileNotFoundError: if a file is missing; the message says how to get it.
        ValueError: if a file is not what its name says.
    """
    train_images, train_labels, test_images, test_labels = read_fashion_mnist(data_dir)
    return ImageData(
        train_images=_pixels(train_images[:num_train]),
        train_labels=train_labels[:num_train].astype(np.int32),
        test_images=_pixels(test_images),
        test_labels=test_labels.astype(np.int32),
    )


def read_fashion_mnist(data_dir: Path | None = None) -> tuple[np.ndarray, ...]:
    """The four files as they are: unsigned bytes [N, 28, 28], [N], [M, 28, 28] and [M].

    Raises:
        FileNotFoundError, ValueError: as `load_fashion_mnist`.
    """
    folder = FASHION_MNIST_DIR if data_dir is None else Path(data_dir)
    train_images, train_labels, test_images, test_labels = (
        read_idx(_find_idx(folder, name)) for name in FASHION_MNIST_FILES
    )
    for images, labels in ((train_images, train_labels), (test_images, test_labels)):
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"{folder} holds images of shape {images.shape} and labels of shape {labels.shape}, not [N, height, "
                "width] and [N]: are its files complete, and named as they should be?"
            )
    return train_images, train_labels, test_images, test_labels


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of unsigned bytes, gzipped or not: two zeros, the type, the number of axes, their lengths, the data.

    Raises:
        ValueError: if the file is something else, or cut short.
    """
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(content) < 4 or content[:3] != bytes([0, 0, IDX_UNSIGNED_BYTES]):
        raise ValueError(f"{path} is no IDX file of unsigned bytes: it starts with the bytes {list(content[:4])}.")
    num_axes = content[3]
    start = 4 + 4 * num_axes
    shape = tuple(int(n) for n in np.frombuffer(content[4:start], dtype=">u4"))
    if len(shape) != num_axes or len(content) - start != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{path} has {len(content) - start} bytes of data where its header says {shape}: get it anew.")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


def _find_idx(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"Fashion-MNIST is not there: {folder} has no {name}.gz (nor {name}). On Debian or Ubuntu get it with\n"
        "    apt-get install dataset-fashion-mnist\n"
        "or name a folder that holds its four IDX files with\n"
        "    --data-dir FOLDER"
    )


def _pixels(images: np.ndarray) -> np.ndarray:
    return (images.reshape(len(images), -1) / 255).astype(np.float32)
