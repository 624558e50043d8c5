"""CIFAR-10 from its original binary batches, or from lossless WebP sheets of the same pixels.
Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments.datasets import sources
from experiments.datasets.prepared import Splits, cached, prepare

BATCHES = ("train_1", "train_2", "train_3", "train_4", "train_5", "test")
BINARY = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
SHEETS = (*(f"cifar10_{batch}.webp" for batch in BATCHES), "cifar10_labels.npz")
BATCH = 10_000  # images in one original batch
HOMEPAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"


def load_cifar10(data_dir: Path) -> tuple[Splits, int] | None:
    """Returns splits `train`, `test` of ten classes, or None if `data_dir` holds no file of them.

    Looks for the binary batches (also in `cifar-10-batches-bin`), then for the sheets.
    Raises FileNotFoundError if only some of the files are there, ValueError if one is damaged."""
    here = (data_dir / "cifar10", data_dir)
    unpacked = tuple(folder / "cifar-10-batches-bin" for folder in here)
    if folder := sources.find_folder((*unpacked, *here), BINARY):
        return _load(folder, BINARY, _read_binary)
    if folder := sources.find_folder(here, SHEETS):
        return _load(folder, SHEETS, _read_sheets)
    return None


def _load(folder: Path, files: tuple[str, ...], read: Callable) -> tuple[Splits, int]:
    sources.require(folder, files)

    def make(scratch):
        *train, test = read(folder)
        images, labels = (np.concatenate(part) for part in zip(*train, strict=True))
        splits = {"train": (images, labels), "test": test}
        return prepare("cifar10", splits, 10, scratch, homepage=HOMEPAGE)

    return cached(f"cifar10-{sources.digest(folder, files)}", make)


def _read_binary(folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each record is a label byte, then 32x32 red, green and blue planes."""
    batches = []
    for file in BINARY:
        raw = np.fromfile(folder / file, np.uint8)
        if raw.size != BATCH * 3073:
            raise ValueError(
                f"{folder / file}: holds {raw.size} bytes, a batch of {BATCH} images has "
                f"{BATCH * 3073}. Unpack the archive again."
            )
        records = raw.reshape(-1, 3073)
        images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        batches.append((images, _labels(folder / file, records[:, 0], len(images))))
    return batches


def _read_sheets(folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """A sheet holds the images of one batch row by row, each 32x32."""
    batches = []
    with np.load(folder / "cifar10_labels.npz") as labels:
        for name, file in zip(BATCHES, SHEETS, strict=False):
            images = _read_sheet(folder / file)
            batches.append((images, _labels(folder / file, labels[name], len(images))))
    return batches


def _read_sheet(path: Path) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path) as image:
            sheet = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path}: not a whole image ({error}). Fetch it again.") from error
    h, w, _ = sheet.shape
    if h % 32 or w % 32:
        raise ValueError(f"{path}: a sheet of {h}x{w} pixels does not divide into 32x32 images.")
    return sheet.reshape(h // 32, 32, w // 32, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)


def _labels(path: Path, labels: np.ndarray, count: int) -> np.ndarray:
    if labels.shape != (count,) or labels.max(initial=0) > 9:
        raise ValueError(
            f"{path}: {count} images need as many labels from 0 to 9, found shape "
            f"{labels.shape}, largest {labels.max(initial=0)}."
        )
    return labels.astype(np.int32)
