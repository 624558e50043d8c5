"""The images an experiment trains on, is tuned on and is tested on, as arrays, by name.

>>> data = load("digits", seed=0)
>>> data.train_images.shape, data.validation_images.shape, data.test_images.shape
((1295, 8, 8, 1), (143, 8, 8, 1), (359, 8, 8, 1))
"""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from experiments.datasets import idx
from experiments.datasets.catalogue import load_catalogue
from experiments.datasets.cifar10 import BINARY, SHEETS, load_cifar10
from experiments.datasets.digits import load_digits
from experiments.datasets.prepared import Images, Labels, Splits, cache_dir


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Images as uint8 (n, h, w, c), labels as int32 (n,) in 0..classes-1, in three parts.

    `mean` and `std` are those of the training pixels / 255, one per channel."""

    name: str
    classes: int
    train_images: Images
    train_labels: Labels
    validation_images: Images
    validation_labels: Labels
    test_images: Images
    test_labels: Labels
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.train_images.shape[1:]

    def normalize(self, images: Images | UInt8[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        """(images / 255 - mean) / std in float32, on the device."""
        x = jnp.asarray(images).astype(jnp.float32) / 255
        return (x - jnp.asarray(self.mean, jnp.float32)) / jnp.asarray(self.std, jnp.float32)


def load(
    name: str,
    *,
    data_dir: str | Path | None = None,
    seed: int = 0,
    validation: int | None = None,
) -> Dataset:
    """Returns the set `name`: "digits" (embedded), "mnist", "fashion_mnist", "cifar10", or any
    image classification set of TensorFlow Datasets prepared under `data_dir`.

    `data_dir` holds the original files, itself or in a sub-folder `name`; by default the cache
    folder (`$QUANTJAX_DATA`, else `~/.cache/quantjax`). `validation` images, by default a tenth of
    the training images and at most 5,000, are held out by `seed`, which fixes the split. A set
    without a test split gives a fifth to the test, by `seed` too.
    Raises FileNotFoundError or ValueError naming the path, the files expected and the remedy."""
    folder = Path(data_dir).expanduser() if data_dir is not None else cache_dir()
    if data_dir is not None and not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder, given as the data folder of {name!r}.")
    splits, classes = _read(name, folder)
    rest, test = splits["train"], splits.get("test")
    if test is None:
        rest, test = _cut(*rest, held_out=len(rest[1]) // 5, seed=seed)
    count = len(rest[1])
    held_out = min(5_000, count // 10) if validation is None else validation
    if not 0 <= held_out < count:
        raise ValueError(f"{name}: validation={held_out} of {count} training images.")
    train, valid = _cut(*rest, held_out=held_out, seed=seed)
    mean, std = pixel_statistics(train[0])
    return Dataset(
        name=name,
        classes=classes,
        train_images=train[0],
        train_labels=train[1],
        validation_images=valid[0],
        validation_labels=valid[1],
        test_images=test[0],
        test_labels=test[1],
        mean=mean,
        std=std,
    )


def pixel_statistics(images: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of images / 255 per channel, from exact integer sums.

    A constant channel has the deviation 1, so that normalizing it is finite."""
    levels = np.arange(256) / 255
    means, stds = [], []
    for channel in range(images.shape[-1]):
        share = np.bincount(images[..., channel].ravel(), minlength=256) / images[..., 0].size
        means.append(float(share @ levels))
        stds.append(float(np.sqrt(share @ (levels - means[-1]) ** 2)) or 1.0)
    return tuple(means), tuple(stds)


def _read(name: str, folder: Path) -> tuple[Splits, int]:
    expected: tuple[tuple[str, ...], ...] = ()
    found = None
    if name == "digits":
        found = load_digits()
    elif name in idx.HOMEPAGES:
        expected, found = (idx.FILES,), idx.load_idx(name, folder)
    elif name == "cifar10":
        expected, found = (BINARY, SHEETS), load_cifar10(folder)
    if found is not None:
        return found
    try:
        return load_catalogue(name, folder)
    except FileNotFoundError as error:
        if not expected:
            raise
        files = ", or ".join(", ".join(group) for group in expected)
        raise FileNotFoundError(
            f"{name}: found in neither {folder} nor {folder / name}. Put its original files "
            f"there ({files}), or pass the folder that holds them as --data-dir. {error}"
        ) from error


def _cut(images: Images, labels: Labels, *, held_out: int, seed: int):
    """Cuts off `held_out` examples chosen by `seed`; both parts keep the order of the source."""
    order = np.random.RandomState(seed).permutation(len(labels))  # a stream NumPy has frozen
    kept, out = np.sort(order[held_out:]), np.sort(order[:held_out])
    return (images[kept], labels[kept]), (images[out], labels[out])
