"""Image data sets in the formats that their authors publish, as bytes: nothing is downloaded unless asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from data import load_digits, read_fashion_mnist

from loaders.cifar import load_cifar
from loaders.hugging_face import download
from loaders.image_folder import load_image_folder
from loaders.labelled_images import DataSet, LabelledImages, pad_to
from loaders.svhn import load_svhn

Name = Literal["digits", "fashion_mnist", "cifar10", "cifar100", "svhn", "image_folder"]

__all__ = ["DataSet", "LabelledImages", "Name", "load"]


def load(
    name: Name,
    data_dir: Path | None = None,
    *,
    from_hub: bool = False,
    image_size: int | None = None,
    num_train: int | None = None,
) -> DataSet:
    """The data set of this name.

    Args:
        name: which one.
        data_dir: the folder that holds its files. `digits` has none; `fashion_mnist` has a default.
        from_hub: get it with Hugging Face `datasets` (downloaded once, then cached) instead of from `data_dir`.
        image_size: the side of the images: those of a folder are resized and cropped to it (default 224), smaller
            ones of other data sets padded with zeros.
        num_train: only the first so many training images. Default: all.

    Raises:
        FileNotFoundError: if a file is missing; the message says where to get it.
        ValueError: if a file is not what its name says, or the arguments do not fit the data set.
    """
    if name == "image_folder":
        if data_dir is None:
            raise ValueError("image_folder needs --data.data-dir, a folder with train/CLASS/IMAGE and val/CLASS/IMAGE.")
        data = load_image_folder(data_dir, image_size or 224)
    else:
        data = download(name) if from_hub else _load_local(name, data_dir)
        if image_size is not None:
            data = pad_to(data, image_size)
    return data._replace(train=data.train.first(num_train))


def _load_local(name: str, data_dir: Path | None) -> DataSet:
    if name == "digits":
        digits = load_digits()
        return DataSet(
            LabelledImages(_as_bytes(digits.train_images), digits.train_labels),
            LabelledImages(_as_bytes(digits.test_images), digits.test_labels),
            num_classes=10,
        )
    if name == "fashion_mnist":
        train_images, train_labels, test_images, test_labels = read_fashion_mnist(data_dir)
        return DataSet(
            LabelledImages(train_images[..., None], train_labels.astype(np.int32)),
            LabelledImages(test_images[..., None], test_labels.astype(np.int32)),
            num_classes=10,
        )
    if data_dir is None:
        raise ValueError(f"{name} is read from files: name their folder with --data.data-dir, or add --data.from-hub.")
    return load_svhn(data_dir) if name == "svhn" else load_cifar(name, data_dir)


def _as_bytes(pixels: np.ndarray) -> np.ndarray:
    """Digits [N, 64] in [0, 1], in steps of 1/16, as bytes [N, 8, 8, 1]."""
    return np.round(255 * pixels).astype(np.uint8).reshape(-1, 8, 8, 1)
