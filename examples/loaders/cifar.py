"""CIFAR-10 and CIFAR-100, in the Python version (pickles) or the binary version of their authors."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from loaders.labelled_images import DataSet, LabelledImages, check_labels

HOME = "https://www.cs.toronto.edu/~kriz/cifar.html"
PIXELS = 3 * 32 * 32


class Version(NamedTuple):
    """Where the images of one CIFAR are."""

    folders: tuple[str, ...]  # what its archives unpack to
    python: tuple[list[str], list[str]]  # files for training and for tests
    binary: tuple[list[str], list[str]]
    label_key: bytes  # in the pickles
    label_bytes: int  # before each image of the binary version; the last of them is the class
    num_classes: int


VERSIONS = {
    "cifar10": Version(
        ("cifar-10-batches-py", "cifar-10-batches-bin"),
        ([f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]),
        ([f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"]),
        b"labels",
        1,
        10,
    ),
    "cifar100": Version(
        ("cifar-100-python", "cifar-100-binary"),
        (["train"], ["test"]),
        (["train.bin"], ["test.bin"]),
        b"fine_labels",
        2,
        100,
    ),
}


def load_cifar(name: str, data_dir: Path) -> DataSet:
    """CIFAR from `data_dir`, or from the folder within it that the authors' archive makes.

    Raises:
        FileNotFoundError: if neither version is there.
        ValueError: if a file is damaged, or that of another data set.
    """
    version = VERSIONS[name]
    for folder in (Path(data_dir), *(Path(data_dir) / inner for inner in version.folders)):
        for files, read in ((version.python, read_pickle), (version.binary, read_binary)):
            if all((folder / file).is_file() for split in files for file in split):
                train, test = (_join([read(folder / file, version) for file in split]) for split in files)
                return DataSet(train, test, version.num_classes)
    raise FileNotFoundError(
        f"{name} is not there: {data_dir} has neither {', '.join(version.python[0])} and {version.python[1][0]} nor "
        f"the same of the binary version. Unpack an archive from {HOME} there, or add --data.from-hub."
    )


def read_pickle(path: Path, version: Version) -> LabelledImages:
    """One file of the Python version: a dictionary with the pixels of each image in a row, channels first."""
    with path.open("rb") as file:
        try:
            batch = _CifarUnpickler(file, encoding="bytes").load()
            pixels, labels = batch[b"data"], np.asarray(batch[version.label_key], np.int32)
        except (pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is no pickle of CIFAR: {error!r}. Get it anew.") from error
    return _images(path, np.asarray(pixels, np.uint8), labels, version)


def read_binary(path: Path, version: Version) -> LabelledImages:
    """One file of the binary version: for each image its labels, a byte each, and its pixels, channels first."""
    content = np.fromfile(path, np.uint8)
    record = version.label_bytes + PIXELS
    if len(content) % record or not len(content):
        raise ValueError(f"{path} has {len(content)} bytes, which is no number of records of {record}: get it anew.")
    records = content.reshape(-1, record)
    labels = records[:, version.label_bytes - 1].astype(np.int32)
    return _images(path, records[:, version.label_bytes :], labels, version)


class _CifarUnpickler(pickle.Unpickler):
    """Makes arrays and nothing else: a pickle may name any function, and these come from the net."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return lambda kind, shape, code: np.ndarray(shape, np.dtype(code.decode()))
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return lambda code, align, copy: np.dtype(code, align=bool(align), copy=bool(copy))  # they are ints there
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return lambda text, encoding: text.encode(encoding)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _images(path: Path, pixels: np.ndarray, labels: np.ndarray, version: Version) -> LabelledImages:
    if pixels.ndim != 2 or pixels.shape[1] != PIXELS:
        raise ValueError(f"{path} holds pixels of shape {pixels.shape}, not [N, {PIXELS}]: get it anew.")
    check_labels(path, pixels, labels, version.num_classes)
    return LabelledImages(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels)


def _join(parts: list[LabelledImages]) -> LabelledImages:
    images, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
    return LabelledImages(np.ascontiguousarray(images), labels)
