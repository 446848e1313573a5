"""Folders of images, one folder a class, as ImageNet comes: decoded when they are needed."""

from __future__ import annotations

import concurrent.futures
import os
from pathlib import Path

import numpy as np
import PIL.Image

from loaders.labelled_images import DataSet, LabelledImages

EXTENSIONS = (".jpeg", ".jpg", ".png", ".bmp", ".webp")
TEST_FOLDERS = ("val", "validation", "test")


class DecodedOnDemand:
    """Image files that behave like an array of bytes [N, size, size, 3] when indexed."""

    def __init__(self, paths: list[Path], size: int) -> None:
        self.paths, self.size = paths, size
        self.shape = (len(paths), size, size, 3)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, indices: slice | np.ndarray) -> DecodedOnDemand | np.ndarray:
        """The same of fewer files for a slice; decoded images for indices."""
        if isinstance(indices, slice):
            return DecodedOnDemand(self.paths[indices], self.size)
        flat = np.asarray(indices).reshape(-1)
        with concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count()) as threads:
            images = list(threads.map(lambda index: decode(self.paths[index], self.size), flat))
        return np.stack(images).reshape(*np.shape(indices), *self.shape[1:])


def decode(path: Path, size: int) -> np.ndarray:
    """The middle of an image whose shorter side is resized to 8/7 of `size` (256 for 224)."""
    try:
        with PIL.Image.open(path) as image:
            shorter = round(size * 8 / 7)
            image.draft("RGB", (shorter, shorter))  # a JPEG is decoded at a fraction of its size where that is enough
            shape = [max(shorter, round(side * shorter / min(image.size))) for side in image.size]
            resized = image.convert("RGB").resize(shape, PIL.Image.Resampling.BILINEAR)
    except OSError as error:
        raise ValueError(f"{path} is no image that can be read: {error}") from error
    left, top = ((side - size) // 2 for side in resized.size)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def load_image_folder(data_dir: Path, size: int) -> DataSet:
    """Images from train/CLASS/ and val/CLASS/ (or validation/, or test/); classes are numbered by their sorted names.

    Raises:
        FileNotFoundError: if there are no such folders, or no images in them.
        ValueError: if the test images have classes that the training images lack.
    """
    train_folder = Path(data_dir) / "train"
    test_folder = next((Path(data_dir) / name for name in TEST_FOLDERS if (Path(data_dir) / name).is_dir()), None)
    if not train_folder.is_dir() or test_folder is None:
        raise FileNotFoundError(
            f"{data_dir} holds no folders train and {' or '.join(TEST_FOLDERS)} with one folder of images a class."
        )
    classes = sorted(folder.name for folder in train_folder.iterdir() if folder.is_dir())
    unknown = sorted({folder.name for folder in test_folder.iterdir() if folder.is_dir()} - set(classes))
    if unknown:
        raise ValueError(f"{test_folder} has classes that {train_folder} lacks: {', '.join(unknown[:5])}.")
    return DataSet(*(_list(folder, classes, size) for folder in (train_folder, test_folder)), len(classes))


def _list(folder: Path, classes: list[str], size: int) -> LabelledImages:
    files = [
        (path, label)
        for label, name in enumerate(classes)
        if (folder / name).is_dir()
        for path in sorted((folder / name).iterdir())
        if path.suffix.lower() in EXTENSIONS
    ]
    if not files:
        raise FileNotFoundError(f"{folder} holds no image whose name ends in one of {', '.join(EXTENSIONS)}.")
    paths, labels = zip(*files, strict=True)
    return LabelledImages(DecodedOnDemand(list(paths), size), np.asarray(labels, np.int32))
