"""Street View House Numbers, the cropped digits, in the MATLAB files of their authors."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from loaders.labelled_images import DataSet, LabelledImages, check_labels

HOME = "http://ufldl.stanford.edu/housenumbers/"


def load_svhn(data_dir: Path) -> DataSet:
    """SVHN from train_32x32.mat and test_32x32.mat in `data_dir`; extra_32x32.mat is not used.

    Raises:
        FileNotFoundError: if one is missing.
        ValueError: if one is damaged.
    """
    splits = []
    for file in ("train_32x32.mat", "test_32x32.mat"):
        path = Path(data_dir) / file
        if not path.is_file():
            raise FileNotFoundError(
                f"SVHN is not there: {data_dir} has no {file}. Get it from {HOME} (format 2), or add --data.from-hub."
            )
        splits.append(read_mat(path))
    return DataSet(*splits, num_classes=10)


def read_mat(path: Path) -> LabelledImages:
    """One file: X [32, 32, 3, N], the images, and y [N, 1], their digits, where 10 stands for zero."""
    import scipy.io

    try:
        content = scipy.io.loadmat(path, variable_names=("X", "y"))
        images, labels = content["X"], content["y"].reshape(-1).astype(np.int32)
    except (KeyError, ValueError, TypeError, NotImplementedError) as error:
        raise ValueError(f"{path} is no file of SVHN: {error!r}. Get it anew.") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[:3] != (32, 32, 3):
        raise ValueError(f"{path} holds X of {images.dtype}{list(images.shape)}, not uint8[32, 32, 3, N]: get it anew.")
    images = np.ascontiguousarray(images.transpose(3, 0, 1, 2))
    labels = np.where(labels == 10, 0, labels)
    check_labels(path, images, labels, 10)
    return LabelledImages(images, labels)
