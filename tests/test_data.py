"""Each way a data set is read, split and cached, and what it says when a file is wrong."""

import gzip
import struct

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn import datasets as sklearn_datasets

from experiments.data import load
from experiments.datasets import cifar10, digits, idx, prepared


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTJAX_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_idx(path, array, *, magic=None):
    magic = bytes((0, 0, 8, array.ndim)) if magic is None else magic
    header = magic + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


@pytest.fixture
def mnist(tmp_path):
    """Small originals: each pixel of training image i is i, of test image i it is 200 + i."""
    folder = tmp_path / "originals"
    folder.mkdir()
    for split, count, start in (("train", 60, 0), ("t10k", 20, 200)):
        images = np.broadcast_to(np.arange(start, start + count)[:, None, None], (count, 4, 4))
        write_idx(folder / f"{split}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{split}-labels-idx1-ubyte.gz", np.arange(count) % 10)
    return folder


def test_digits_are_those_of_scikit_learn():
    data = load("digits", seed=3)
    sizes = [len(x) for x in (data.train_labels, data.validation_labels, data.test_labels)]
    assert sizes == [1295, 143, 359]
    assert data.image_shape == (8, 8, 1) and data.classes == 10
    (images, labels), source = digits.load_digits()[0]["train"], sklearn_datasets.load_digits()
    # 17 levels over 256: dividing and rounding gives the level back.
    np.testing.assert_array_equal(np.round(images[..., 0] / 255 * 16), source.images)
    np.testing.assert_array_equal(labels, source.target)


def test_a_second_load_reads_the_stored_arrays_alone(mnist, monkeypatch):
    first = load("mnist", data_dir=mnist)

    def prepared_again(*args, **kwargs):
        raise AssertionError("prepared a second time")

    monkeypatch.setattr(idx, "prepare", prepared_again)
    np.testing.assert_array_equal(load("mnist", data_dir=mnist).train_images, first.train_images)


def test_other_files_under_the_same_name_are_another_set(mnist):
    load("mnist", data_dir=mnist)
    write_idx(mnist / "t10k-images-idx3-ubyte.gz", np.full((20, 4, 4), 7))
    assert np.all(load("mnist", data_dir=mnist).test_images == 7)


def test_a_split_is_fixed_by_its_seed(mnist):
    a, b, c = (load("mnist", data_dir=mnist, seed=seed, validation=15) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a.validation_images, b.validation_images)
    assert not np.array_equal(a.validation_images, c.validation_images)


@pytest.mark.parametrize("validation, expected", [(None, 6), (15, 15), (0, 0)])
def test_train_and_validation_share_no_image_and_lose_none(mnist, validation, expected):
    data = load("mnist", data_dir=mnist, seed=5, validation=validation)
    train, valid = data.train_images[:, 0, 0, 0], data.validation_images[:, 0, 0, 0]
    assert len(valid) == expected
    np.testing.assert_array_equal(np.sort(np.concatenate([train, valid])), np.arange(60))
    np.testing.assert_array_equal(data.train_labels, train % 10)
    np.testing.assert_array_equal(data.validation_labels, valid % 10)
    np.testing.assert_array_equal(data.test_images[:, 0, 0, 0], np.arange(200, 220))


def test_the_test_part_of_a_single_split_shares_no_image():
    data = load("digits", seed=0)
    parts = (data.train_images, data.validation_images, data.test_images)
    rows = [{x.tobytes() for x in part} for part in parts]
    assert sum(map(len, rows)) == len(set.union(*rows)) == 1797  # no two digits are equal


def test_originals_may_lie_in_a_folder_of_the_name(mnist):
    (mnist.parent / "all").mkdir()
    mnist.rename(mnist.parent / "all" / "fashion_mnist")
    assert len(load("fashion_mnist", data_dir=mnist.parent / "all").test_labels) == 20


def test_normalized_training_pixels_have_mean_0_and_deviation_1(mnist):
    data = load("mnist", data_dir=mnist)
    x = np.asarray(data.normalize(data.train_images), np.float64)
    # float32 rounding of pixels of size 1, in units of the standard deviation, about 0.07
    np.testing.assert_allclose([x.mean(), x.std()], [0, 1], atol=1e-5)


def test_a_missing_original_is_named(mnist):
    (mnist / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match="originals: missing t10k-labels-idx1-ubyte.gz"):
        load("mnist", data_dir=mnist)


def test_without_originals_the_message_lists_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte.gz.*--data-dir"):
        load("mnist", data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="data_batch_1.bin.*cifar10_labels.npz"):
        load("cifar10", data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="absent: no such folder"):
        load("mnist", data_dir=tmp_path / "absent")


def test_a_truncated_original_is_named(mnist):
    path = mnist / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="train-images-idx3-ubyte.gz: not a whole gzip file"):
        load("mnist", data_dir=mnist)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"\0\0\x08\x01" + struct.pack(">I", 3) + b"abc", "rank 3 starts with 00 00 08 03"),
        (b"\0\0\x0d\x03" + struct.pack(">3I", 1, 1, 1) + b"abcd", "starts with 00 00 0d 03"),
        (b"\0\0\x08\x03" + struct.pack(">3I", 2, 2, 2) + b"seven..", "holds 7 values"),
        (b"\0\0\x08\x03\0\0", "ends within its header of 16 bytes"),
        (b"", "starts with "),
    ],
)
def test_a_file_that_is_not_idx_of_images_is_refused(tmp_path, content, message):
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=message):
        idx.read_idx(path, rank=3)


def test_labels_that_do_not_fit_the_images_are_refused(mnist):
    write_idx(mnist / "train-labels-idx1-ubyte.gz", np.zeros(59))
    with pytest.raises(ValueError, match="60 train images but 59 labels"):
        load("mnist", data_dir=mnist)


@pytest.fixture
def batches():
    """Six CIFAR-10 batches of six images."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (6, 6, 32, 32, 3), dtype=np.uint8)
    return images, random.integers(0, 10, (6, 6), dtype=np.uint8)


def write_sheets(folder, images, labels):
    folder.mkdir()
    for name, batch in zip(cifar10.BATCHES, images, strict=True):
        sheet = batch.reshape(2, 3, 32, 32, 3).swapaxes(1, 2).reshape(64, 96, 3)
        Image.fromarray(sheet).save(folder / f"cifar10_{name}.webp", lossless=True)
    np.savez(folder / "cifar10_labels.npz", **dict(zip(cifar10.BATCHES, labels, strict=True)))


def test_cifar10_is_equal_from_sheets_and_binary_batches(tmp_path, batches, monkeypatch):
    monkeypatch.setattr(cifar10, "BATCH", 6)
    images, labels = batches
    write_sheets(tmp_path / "sheets", images, labels)
    binary = tmp_path / "binary" / "cifar-10-batches-bin"
    binary.mkdir(parents=True)
    for file, x, y in zip(cifar10.BINARY, images, labels, strict=True):
        planes = x.transpose(0, 3, 1, 2).reshape(6, -1)
        np.concatenate([y[:, None], planes], axis=1).tofile(binary / file)
    for folder in ("sheets", "binary"):
        data = load("cifar10", data_dir=tmp_path / folder, validation=0)
        np.testing.assert_array_equal(data.train_images, images[:5].reshape(30, 32, 32, 3))
        np.testing.assert_array_equal(data.train_labels, labels[:5].ravel())
        np.testing.assert_array_equal(data.test_images, images[5])
        np.testing.assert_array_equal(data.test_labels, labels[5])


def test_a_damaged_cifar10_file_is_named(tmp_path, batches):
    write_sheets(tmp_path / "sheets", *batches)
    path = tmp_path / "sheets" / "cifar10_test.webp"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="cifar10_test.webp: not a whole image"):
        load("cifar10", data_dir=tmp_path / "sheets")
    for file in cifar10.BINARY:
        (tmp_path / file).write_bytes(b"short")
    with pytest.raises(ValueError, match="data_batch_1.bin: holds 5 bytes"):
        load("cifar10", data_dir=tmp_path)


def write_catalogue_set(folder, splits, features, *, name="little_pictures"):
    """Prepares, as another program would, a TFDS set of PNG images under `folder`."""

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("2.1.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {split: enumerate(records) for split, records in splits.items()}

        def _generate_examples(self):
            raise NotImplementedError

    Builder.name = name
    tfds.disable_progress_bar()
    Builder(data_dir=folder, file_format="array_record").download_and_prepare()


def test_a_prepared_set_of_the_catalogue_is_read_by_name(tmp_path):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (30, 5, 6, 3), dtype=np.uint8)
    records = [{"image": Image.fromarray(x), "label": i % 3} for i, x in enumerate(images)]
    features = {
        "image": tfds.features.Image(shape=(5, 6, 3), encoding_format="png"),
        "label": tfds.features.ClassLabel(num_classes=3),
    }
    splits = {"train": records[:20], "validation": records[20:]}
    write_catalogue_set(tmp_path / "tfds", splits, features)
    for name, folder in (("little_pictures", ""), ("little_pictures:2.1.0", "little_pictures")):
        data = load(name, data_dir=tmp_path / "tfds" / folder, validation=4)
        assert data.classes == 3 and len(data.train_labels) == 16
        pairs = zip(data.test_images, data.test_labels, strict=True)
        found = {image.tobytes(): int(label) for image, label in pairs}
        assert found == {images[i].tobytes(): i % 3 for i in range(20, 30)}


@pytest.mark.parametrize("missing", ["image", "label"])
def test_a_set_that_is_no_image_classification_is_refused(tmp_path, missing):
    number = tfds.features.Tensor(shape=(), dtype=np.int32)
    features = {"image": number, "label": tfds.features.ClassLabel(num_classes=3)}
    features[f"other_{missing}"] = features.pop(missing)
    write_catalogue_set(tmp_path, {"train": [dict.fromkeys(features, 1)]}, features)
    with pytest.raises(ValueError, match=f"'image' and 'label', found .*other_{missing}"):
        load("little_pictures", data_dir=tmp_path)


def test_images_of_several_shapes_are_refused():
    with pytest.raises(ValueError, match="uint8 of one shape"):
        prepared.stack([np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8)], [0, 1])


def test_an_unknown_name_offers_the_nearest():
    with pytest.raises(ValueError, match="unknown data set 'minst'.*mnist"):
        load("minst")
    with pytest.raises(ValueError, match="no data set name"):
        load("../digits")


def test_a_stock_set_that_is_not_prepared_names_the_remedy(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # as without TensorFlow
    with pytest.raises(FileNotFoundError, match="svhn_cropped: not prepared.*download_and_prepare"):
        load("svhn_cropped")


@pytest.mark.parametrize("validation", [-1, 60])
def test_a_validation_part_that_leaves_nothing_is_refused(mnist, validation):
    with pytest.raises(ValueError, match=f"validation={validation} of 60"):
        load("mnist", data_dir=mnist, validation=validation)


SPLITS = {"train": (np.zeros((2, 1, 1, 1), np.uint8), np.zeros(2, np.int32))}


def test_an_interrupted_preparation_leaves_nothing(cache):
    def interrupted(folder):
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared.cached("set", interrupted)
    assert list(cache.iterdir()) == []
    assert prepared.cached("set", lambda folder: (SPLITS, 4))[1] == 4


def test_of_two_concurrent_preparations_the_first_to_finish_wins(cache):
    def slow(folder):
        prepared.cached("set", lambda _: (SPLITS, 1))  # the other process, meanwhile
        return SPLITS, 2

    assert prepared.cached("set", slow)[1] == 1
    assert len(list(cache.iterdir())) == 1


def test_a_damaged_cache_names_its_folder(cache):
    prepared.cached("set", lambda folder: (SPLITS, 4))
    (path,) = cache.glob("*/arrays.npz")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"Delete {path.parent}"):
        prepared.cached("set", lambda folder: (SPLITS, 4))
