"""Data sets from the Hugging Face hub: downloaded once, then read from its cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from loaders.labelled_images import DataSet, LabelledImages, check_labels


class Repository(NamedTuple):
    """A data set on the hub, with splits "train" and "test"."""

    path: str
    configuration: str | None
    image_column: str
    label_column: str
    num_classes: int


REPOSITORIES = {
    "fashion_mnist": Repository("zalando-datasets/fashion_mnist", None, "image", "label", 10),
    "cifar10": Repository("uoft-cs/cifar10", None, "img", "label", 10),
    "cifar100": Repository("uoft-cs/cifar100", None, "img", "fine_label", 100),
    "svhn": Repository("ufldl-stanford/svhn", "cropped_digits", "image", "label", 10),
}


def download(name: str) -> DataSet:
    """The data set of this name, with Hugging Face `datasets`.

    Raises:
        ValueError: if the hub has it not, what it has is not as expected, or `datasets` is not installed.
    """
    if name not in REPOSITORIES:
        raise ValueError(f"--data.from-hub knows {', '.join(REPOSITORIES)}, not {name}: leave it out.")
    return read_repository(REPOSITORIES[name])


def read_repository(repository: Repository) -> DataSet:
    """Both splits as arrays; a local folder in the place of `path` is read as well."""
    try:
        import datasets  # only here: it takes a second to import, and most runs read local files
    except ModuleNotFoundError as error:
        raise ValueError(
            '--data.from-hub needs Hugging Face datasets: pip install -e ".[examples,hub]", or name a folder with '
            "--data.data-dir."
        ) from error
    splits = datasets.load_dataset(repository.path, repository.configuration)
    return DataSet(*(_as_arrays(splits[split], repository) for split in ("train", "test")), repository.num_classes)


def _as_arrays(split: Any, repository: Repository) -> LabelledImages:
    missing = {repository.image_column, repository.label_column} - set(split.column_names)
    if missing:
        raise ValueError(f"{repository.path} has the columns {split.column_names}, but not {', '.join(missing)}.")
    images = np.stack([np.asarray(image) for image in split[repository.image_column]])
    labels = np.asarray(split[repository.label_column], np.int32)
    check_labels(repository.path, images, labels, repository.num_classes)
    return LabelledImages(images if images.ndim == 4 else images[..., None], labels)
