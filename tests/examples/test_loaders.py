"""Loaders read small files in the real formats, and say what is wrong with files that are not."""

import gzip
import io
import pickle
import struct

import loaders
import numpy as np
import PIL.Image
import pytest
import scipy.io
from loaders.cifar import VERSIONS, read_pickle
from loaders.hugging_face import Repository, read_repository
from loaders.labelled_images import DataSet, LabelledImages

RNG = np.random.default_rng(0)


class Python2Pickler(pickle._Pickler):
    """Writes arrays and strings as the Python 2 of CIFAR's authors did: integers for flags, bytes for strings."""

    def save_str(self, text):
        self.save_bytes_as_string(text.encode("latin1"))

    def save_bytes_as_string(self, content):
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)
        self.memoize(content)

    def reducer_override(self, thing):
        if isinstance(thing, np.ndarray):
            state = (1, thing.shape, thing.dtype, 0, Raw(thing.tobytes()))
            return Global("numpy.core.multiarray", "_reconstruct"), (np.ndarray, (0,), Raw(b"b")), state
        if isinstance(thing, np.dtype):
            return np.dtype, (Raw(thing.str.lstrip("|<").encode()), 0, 1), (3, Raw(b"|"), None, None, None, -1, -1, 0)
        return NotImplemented


class Raw(bytes):
    """Bytes that Python 2 called a string."""


class Global:
    def __init__(self, module, name):
        self.module, self.name = module, name

    def __call__(self):
        raise NotImplementedError


def python2_pickle(path, content):
    buffer = io.BytesIO()
    pickler = Python2Pickler(buffer, protocol=2)
    pickler.dispatch = pickle._Pickler.dispatch | {
        str: Python2Pickler.save_str,
        Raw: Python2Pickler.save_bytes_as_string,
        Global: lambda self, thing: self.write(pickle.GLOBAL + f"{thing.module}\n{thing.name}\n".encode()),
    }
    pickler.dump(content)
    path.write_bytes(buffer.getvalue())


def rows(count: int) -> np.ndarray:
    return RNG.integers(0, 256, (count, 3072), np.uint8)


def as_images(rows: np.ndarray) -> np.ndarray:
    """Red, green and blue planes of 32 x 32, row by row: the description on CIFAR's page."""
    images = np.empty((len(rows), 32, 32, 3), np.uint8)
    for channel in range(3):
        for row in range(32):
            start = 1024 * channel + 32 * row
            images[:, row, :, channel] = rows[:, start : start + 32]
    return images


def write_cifar10_python(folder):
    folder.mkdir()
    parts = []
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        data, labels = rows(4), RNG.integers(0, 10, 4).tolist()
        python2_pickle(folder / name, {"batch_label": name, "labels": labels, "data": data, "filenames": ["a.png"] * 4})
        parts.append((data, labels))
    return parts


def test_pickles_of_the_test_are_those_of_python_2(tmp_path):
    python2_pickle(tmp_path / "x", {"data": np.zeros((1, 2), np.uint8), "labels": [3]})
    content = (tmp_path / "x").read_bytes()
    assert b"cnumpy.core.multiarray\n_reconstruct\n" in content and b"cnumpy\ndtype\n" in content
    assert pickle.BINUNICODE not in content and b"_codecs" not in content


def test_cifar10_from_the_python_version(tmp_path):
    parts = write_cifar10_python(tmp_path / "cifar-10-batches-py")  # the folder that the archive makes
    data = loaders.load("cifar10", tmp_path)
    expected = np.concatenate([as_images(pixels) for pixels, _ in parts[:5]])
    np.testing.assert_array_equal(data.train.images, expected)
    np.testing.assert_array_equal(data.train.labels, np.concatenate([labels for _, labels in parts[:5]]))
    np.testing.assert_array_equal(data.test.images, as_images(parts[5][0]))
    assert data.train.labels.dtype == np.int32 and data.num_classes == 10 and data.image_shape == (32, 32, 3)


def test_cifar10_from_pickles_of_python_3(tmp_path):
    data = rows(3)
    (tmp_path / "x").write_bytes(pickle.dumps({b"labels": [1, 2, 3], b"data": data}, protocol=2))
    read = read_pickle(tmp_path / "x", VERSIONS["cifar10"])
    np.testing.assert_array_equal(read.images, as_images(data))


def test_cifar10_from_the_binary_version(tmp_path):
    parts = []
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        data, labels = rows(3), RNG.integers(0, 10, 3, np.uint8)
        (tmp_path / name).write_bytes(np.concatenate([labels[:, None], data], axis=1).tobytes())
        parts.append((data, labels))
    data = loaders.load("cifar10", tmp_path, num_train=7)
    np.testing.assert_array_equal(data.train.images, np.concatenate([as_images(p) for p, _ in parts[:5]])[:7])
    np.testing.assert_array_equal(data.test.labels, parts[5][1])


@pytest.mark.parametrize("is_binary", [True, False])
def test_cifar100_has_fine_labels(tmp_path, is_binary):
    parts = {}
    for name in ("train", "test"):
        data, coarse, fine = rows(5), RNG.integers(0, 20, 5, np.uint8), RNG.integers(50, 100, 5, np.uint8)
        if is_binary:
            content = np.concatenate([coarse[:, None], fine[:, None], data], axis=1)
            (tmp_path / f"{name}.bin").write_bytes(content.tobytes())
        else:
            labels = {"coarse_labels": coarse.tolist(), "fine_labels": fine.tolist()}
            python2_pickle(tmp_path / name, labels | {"data": data})
        parts[name] = data, fine
    data = loaders.load("cifar100", tmp_path)
    for split, name in ((data.train, "train"), (data.test, "test")):
        np.testing.assert_array_equal(split.images, as_images(parts[name][0]))
        np.testing.assert_array_equal(split.labels, parts[name][1])
    assert data.num_classes == 100


def test_pickle_that_runs_code_is_refused(tmp_path):
    class Attack:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'run')!r}, 'w')",)

    (tmp_path / "x").write_bytes(pickle.dumps({b"labels": [1], b"data": Attack()}, protocol=2))
    with pytest.raises(ValueError, match=r"asks for (__builtin__|builtins)\.exec"):
        read_pickle(tmp_path / "x", VERSIONS["cifar10"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no pickle of CIFAR"),
        (pickle.dumps({b"data": np.zeros((2, 9), np.uint8), b"labels": [0, 1]}), r"shape \(2, 9\)"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}), "2 images and 1 labels"),
        (pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [55]}), "10 classes are expected"),
        (pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"fine_labels": [5]}), "b'labels'"),
    ],
)
def test_damaged_pickle_is_an_error(tmp_path, content, message):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_pickle(tmp_path / "x", VERSIONS["cifar10"])


def test_binary_file_that_is_cut_short_is_an_error(tmp_path):
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        (tmp_path / name).write_bytes(bytes(3072))
    with pytest.raises(ValueError, match="3072 bytes, which is no number of records of 3073"):
        loaders.load("cifar10", tmp_path)


def write_svhn(folder, count: int = 6):
    content = {}
    for name in ("train", "test"):
        images = RNG.integers(0, 256, (32, 32, 3, count), np.uint8)
        digits = RNG.integers(1, 11, (count, 1)).astype(np.uint8)
        digits[0] = 10
        scipy.io.savemat(folder / f"{name}_32x32.mat", {"X": images, "y": digits})
        content[name] = images, digits
    return content


def test_svhn_calls_ten_zero(tmp_path):
    content = write_svhn(tmp_path)
    data = loaders.load("svhn", tmp_path)
    images, digits = content["train"]
    np.testing.assert_array_equal(data.train.images[3], images[..., 3])
    np.testing.assert_array_equal(data.train.labels, digits[:, 0] % 10)
    assert data.train.labels[0] == 0 and data.test.images.shape == (6, 32, 32, 3)


def test_damaged_svhn_is_an_error(tmp_path):
    write_svhn(tmp_path)
    scipy.io.savemat(tmp_path / "test_32x32.mat", {"X": np.zeros((32, 32, 3)), "y": np.ones((1, 1))})
    with pytest.raises(ValueError, match=r"X of float64\[32, 32, 3\], not uint8"):
        loaders.load("svhn", tmp_path)
    (tmp_path / "test_32x32.mat").write_bytes(b"not MATLAB at all" * 20)
    with pytest.raises(ValueError, match="no file of SVHN"):
        loaders.load("svhn", tmp_path)


def test_fashion_mnist_as_bytes_padded_to_32(tmp_path):
    images, labels = RNG.integers(0, 256, (9, 28, 28), np.uint8), RNG.integers(0, 10, 9, np.uint8)
    for name in ("train", "t10k"):
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            (tmp_path / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    data = loaders.load("fashion_mnist", tmp_path, image_size=32)
    np.testing.assert_array_equal(data.train.images[:, 2:30, 2:30, 0], images)
    assert data.train.images.shape == (9, 32, 32, 1) and data.train.images[:, :2].max() == 0
    with pytest.raises(ValueError, match="padded, not shrunk"):
        loaders.load("fashion_mnist", tmp_path, image_size=20)


def test_digits_are_bytes_of_sixteenths():
    data = loaders.load("digits")
    assert data.train.images.shape == (1297, 8, 8, 1) and data.test.images.shape == (500, 8, 8, 1)
    assert set(np.unique(data.train.images)) == {round(255 * level / 16) for level in range(17)}


def test_image_folder_is_decoded_on_demand(tmp_path):
    colours = {"cat": (250, 10, 10), "dog": (10, 250, 10)}
    for split, extension in (("train", "JPEG"), ("val", "png")):
        for name, colour in colours.items():
            (tmp_path / split / name).mkdir(parents=True)
            for i, size in enumerate([(40, 30), (64, 100)]):
                PIL.Image.new("RGB", size, colour).save(tmp_path / split / name / f"{i}.{extension}")
            (tmp_path / split / name / "notes.txt").write_text("no image")
    data = loaders.load("image_folder", tmp_path, image_size=16)
    assert data.image_shape == (16, 16, 3) and data.num_classes == 2 and not data.train.is_in_memory
    np.testing.assert_array_equal(data.train.labels, [0, 0, 1, 1])
    images = data.train.images[np.array([[0, 1], [3, 2]])]
    assert images.shape == (2, 2, 16, 16, 3) and images.dtype == np.uint8
    assert np.abs(images[0].astype(int) - colours["cat"]).max() <= 3  # JPEG is lossy
    np.testing.assert_array_equal(data.test.images[np.array([2])], np.full((1, 16, 16, 3), colours["dog"]))
    assert len(data.train.first(3).images) == 3


def test_middle_of_an_image_is_kept(tmp_path):
    """Shorter side to 8/7 of the size, then the middle: of a wide image, its left and right are lost."""
    picture = np.zeros((64, 192, 3), np.uint8)
    picture[:, 64:128] = 255
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        PIL.Image.fromarray(picture).save(tmp_path / split / "a" / "x.png")
    data = loaders.load("image_folder", tmp_path, image_size=28)
    assert data.train.images[np.array([0])].min() > 200


def test_image_folder_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folders train and val or validation or test"):
        loaders.load("image_folder", tmp_path)
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "val" / "b").mkdir(parents=True)
    with pytest.raises(ValueError, match="lacks: b"):
        loaders.load("image_folder", tmp_path)
    (tmp_path / "val" / "b").rmdir()
    with pytest.raises(FileNotFoundError, match="holds no image"):
        loaders.load("image_folder", tmp_path)
    (tmp_path / "val" / "a").mkdir()
    for split in ("train", "val"):
        (tmp_path / split / "a" / "x.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"x\.png is no image"):
        loaders.load("image_folder", tmp_path).train.images[np.array([0])]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:dill")
def test_repository_of_the_hub_is_read_as_arrays(tmp_path, monkeypatch):
    """A folder of Parquet files as the hub holds it, read by the same call that downloads."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    images = RNG.integers(0, 256, (6, 32, 32, 3), np.uint8)
    features = datasets.Features({"img": datasets.Image(), "fine_label": datasets.Value("int64")})
    (tmp_path / "hub").mkdir()
    for split in ("train", "test"):
        columns = {"img": [PIL.Image.fromarray(image) for image in images], "fine_label": list(range(6))}
        table = datasets.Dataset.from_dict(columns, features=features)
        table.to_parquet(tmp_path / "hub" / f"{split}-00000-of-00001.parquet")
    data = read_repository(Repository(str(tmp_path / "hub"), None, "img", "fine_label", 100))
    np.testing.assert_array_equal(data.train.images, images)
    np.testing.assert_array_equal(data.test.labels, np.arange(6))
    with pytest.raises(ValueError, match="but not label"):
        read_repository(Repository(str(tmp_path / "hub"), None, "img", "label", 100))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("cifar10", {}, "name their folder with --data.data-dir, or add --data.from-hub"),
        ("digits", {"from_hub": True}, "knows fashion_mnist, cifar10"),
        ("image_folder", {}, "needs --data.data-dir"),
        ("digits", {"num_train": 5000}, "1297 images there are, got 5000"),
    ],
)
def test_settings_that_do_not_fit_the_data_are_an_error(name, settings, message):
    with pytest.raises(ValueError, match=message):
        loaders.load(name, **settings)


@pytest.mark.parametrize(
    ("name", "message"),
    [("cifar10", "data_batch_1, .*test_batch.*cs.toronto.edu"), ("svhn", r"no train_32x32\.mat.*ufldl\.stanford")],
)
def test_missing_files_say_where_to_get_them(tmp_path, name, message):
    with pytest.raises(FileNotFoundError, match=message):
        loaders.load(name, tmp_path)


def test_pixel_statistics_are_those_of_each_channel():
    images = RNG.integers(0, 256, (50, 4, 4, 3), np.uint8)
    images[..., 2] = 7
    split = LabelledImages(images, np.zeros(50, np.int32))
    mean, deviation = DataSet(split, split, 1).pixel_statistics()
    np.testing.assert_allclose(mean, images.mean(axis=(0, 1, 2)) / 255, rtol=1e-6)
    np.testing.assert_allclose(deviation[:2], images[..., :2].std(axis=(0, 1, 2)) / 255, rtol=1e-5)
    assert deviation[2] == np.float32(1e-3)  # a constant channel divides by no zero
