"""Image sets prepared once with TensorFlow Datasets, without TensorFlow, and kept as arrays.

A set is written by a builder of our own into array_record files and read back through
`builder.as_data_source`. Reading 60,000 records one by one takes seconds, so the decoded arrays
are stored beside them and later loads read only those."""

import contextlib
import io
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt8

Images = UInt8[np.ndarray, "n h w c"]
Labels = Int32[np.ndarray, "n"]
Splits = dict[str, tuple[Images, Labels]]

VERSION = "1.0.0"  # of the prepared layout: a change here prepares every set again


def cache_dir() -> Path:
    """Where prepared sets are kept: `$QUANTJAX_DATA`, else the user's cache folder `/quantjax`."""
    if chosen := os.environ.get("QUANTJAX_DATA"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "quantjax"


def cached(key: str, make: Callable[[Path], tuple[Splits, int]]) -> tuple[Splits, int]:
    """Returns the splits and the number of classes kept under `key`, making them the first time.

    `make(folder)` may leave files in `folder`; the arrays are stored beside them. The folder is
    built under a temporary name and renamed when complete, so an interrupted or a concurrent
    preparation never leaves a half-written set: the first to finish wins, the others use its set.
    Raises ValueError naming the folder if the stored arrays cannot be read."""
    folder = cache_dir() / f"{key}-v{VERSION}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=folder.parent, prefix=f".{folder.name}-", ignore_cleanup_errors=True
        ) as scratch:
            complete = Path(scratch) / "complete"
            complete.mkdir()
            splits, classes = make(complete)
            _write(complete / "arrays.npz", splits, classes)
            try:
                complete.rename(folder)
            except OSError:  # another process finished first: its folder is as good
                if not folder.exists():
                    raise
    return _read(folder / "arrays.npz")


def prepare(
    name: str, splits: Splits, classes: int, folder: Path, *, homepage: str
) -> tuple[Splits, int]:
    """Writes `splits` as the TFDS set `name` under `folder` and reads them back, in order.

    Needs no TensorFlow: the image is a `Tensor` feature, the files are array_record."""
    import tensorflow_datasets as tfds  # half a second: only where a set is prepared

    base: Any = tfds.core.GeneratorBasedBuilder

    # Not registered: the catalogue keeps its own builder of that name.
    class ArraysBuilder(base, skip_registration=True):  # type: ignore[call-arg]
        VERSION = tfds.core.Version(VERSION)

        def _info(self):
            (images, _), *_ = splits.values()
            features = {
                "image": tfds.features.Tensor(shape=images.shape[1:], dtype=np.uint8),
                "label": tfds.features.ClassLabel(num_classes=classes),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
                homepage=homepage,
                disable_shuffling=True,  # keeps the order of the source
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(*arrays) for split, arrays in splits.items()}

        def _generate_examples(self, images, labels):
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield i, {"image": image, "label": int(label)}

    ArraysBuilder.name = name
    tfds.disable_progress_bar()
    builder = ArraysBuilder(data_dir=folder, file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()):  # its announcements
        builder.download_and_prepare()
    return {split: read_source(builder.as_data_source(split=split)) for split in splits}, classes


def read_source(source) -> tuple[Images, Labels]:
    """Stacks a TFDS data source of `image`, `label` records into uint8 NHWC and int32 arrays.

    Raises ValueError if the images differ in shape or are not uint8."""
    images, labels = [], []
    for start in range(0, len(source), 1000):  # in blocks: far fewer calls into the reader
        stop = min(start + 1000, len(source))
        for record in source.__getitems__(list(range(start, stop))):
            images.append(record["image"])
            labels.append(record["label"])
    return stack(images, labels)


def stack(images: list[np.ndarray], labels: list[int]) -> tuple[Images, Labels]:
    """Stacks images of one shape, (h, w) or (h, w, c), into uint8 NHWC, with their labels."""
    kinds = {(image.shape, str(image.dtype)) for image in images}
    if len(kinds) != 1 or next(iter(kinds))[1] != "uint8":
        raise ValueError(
            f"images must be uint8 of one shape, found {sorted(kinds)[:4]} "
            f"({len(kinds)} kinds): choose a set of equally sized images."
        )
    stacked = np.stack(images)
    if stacked.ndim == 3:
        stacked = stacked[..., None]
    return stacked, np.asarray(labels, np.int32)


def _write(path: Path, splits: Mapping[str, tuple[Images, Labels]], classes: int) -> None:
    arrays: dict[str, Any] = {"classes": np.array(classes)}
    for split, (images, labels) in splits.items():
        arrays |= {f"{split}/images": images, f"{split}/labels": labels}
    np.savez(path, **arrays)


def _read(path: Path) -> tuple[Splits, int]:
    try:
        with np.load(path) as arrays:
            names = [key.removesuffix("/images") for key in arrays if key.endswith("/images")]
            splits = {s: (arrays[f"{s}/images"], arrays[f"{s}/labels"]) for s in names}
            return splits, int(arrays["classes"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path}: cannot be read ({error}). Delete {path.parent} and retry."
        ) from error
