"""Any other image classification set of the TensorFlow Datasets catalogue, by name.

A set already prepared in array_record is read without TensorFlow. Preparing a stock set, and
reading TFRecord files, need TensorFlow; preparing also needs a network."""

import difflib
import hashlib
import importlib.util
import re
from pathlib import Path

import numpy as np

from experiments.datasets.prepared import Splits, cached, read_source, stack

NAME = re.compile(r"\w+(/[\w.-]+)?(:\d+\.\d+\.\d+)?")


def load_catalogue(name: str, data_dir: Path) -> tuple[Splits, int]:
    """Returns the splits of the TFDS set `name` (`name`, `name/config`, `name:version`).

    Keeps `train` and `test`; without `test`, `validation` stands for it. Raises ValueError for a
    set without one uint8 image and one class label per example, FileNotFoundError if it is not
    prepared and cannot be prepared here."""
    import tensorflow_datasets as tfds

    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no data set name: expected name, name/config or name:1.0.0.")
    builder = _prepared_builder(name, data_dir) or _prepare_stock(name, data_dir)
    features = dict(builder.info.features)
    labels = features.get("label")
    if "image" not in features or not isinstance(labels, tfds.features.ClassLabel):
        raise ValueError(
            f"{name}: expected the features 'image' and 'label', found {sorted(features)}. "
            "Only image classification sets are supported."
        )
    names = [split for split in ("train", "test", "validation") if split in builder.info.splits]
    if "train" not in names:
        raise ValueError(f"{name}: has no split 'train', only {sorted(builder.info.splits)}.")
    if len(names) == 3:
        names.remove("validation")  # cut from train by seed, as for every set

    def make(scratch):
        splits = {split: _read(builder, split) for split in names}
        if "test" not in splits and "validation" in splits:
            splits["test"] = splits.pop("validation")
        return splits, labels.num_classes

    return cached(f"{name.replace('/', '-').replace(':', '-')}-{_digest(builder)}", make)


def _prepared_builder(name: str, data_dir: Path):
    import tensorflow_datasets as tfds

    for folder in (data_dir, data_dir.parent):
        try:
            return tfds.core.read_only_builder.builder_from_files(name, data_dir=folder)
        except tfds.core.DatasetNotFoundError:
            continue
    return None


def _prepare_stock(name: str, data_dir: Path):
    import tensorflow_datasets as tfds

    known = tfds.list_builders(with_community_datasets=False)
    base = name.split("/")[0].split(":")[0]
    if base not in known:
        near = difflib.get_close_matches(base, ["digits", *known], n=3)
        raise ValueError(
            f"unknown data set {name!r}: it is neither 'digits', nor prepared under {data_dir}, "
            f"nor in the TensorFlow Datasets catalogue. Nearest names: {', '.join(near) or 'none'}."
        )
    remedy = (
        f"Prepare it where TensorFlow and a network are at hand, with tfds.builder({name!r}, "
        f"data_dir=..., file_format='array_record').download_and_prepare(), and pass that folder "
        f"as --data-dir (now {data_dir})."
    )
    if importlib.util.find_spec("tensorflow") is None:
        raise FileNotFoundError(f"{name}: not prepared, and TensorFlow is not installed. {remedy}")
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        builder.download_and_prepare()
    except Exception as error:
        raise FileNotFoundError(f"{name}: could not be prepared ({error}). {remedy}") from error
    return builder


def _read(builder, split: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        return read_source(builder.as_data_source(split=split))
    except NotImplementedError as error:  # TFRecord: no random access
        if importlib.util.find_spec("tensorflow") is None:
            raise FileNotFoundError(
                f"{builder.data_dir}: is in {builder.info.file_format}, which needs TensorFlow. "
                "Install it, or prepare the set with file_format='array_record'."
            ) from error
    import tensorflow_datasets as tfds

    records = list(tfds.as_numpy(builder.as_dataset(split=split)))
    return stack([r["image"] for r in records], [r["label"] for r in records])


def _digest(builder) -> str:
    """Names the prepared files by what identifies them: name, size and time of change."""
    folder = Path(builder.data_dir)
    files = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in folder.iterdir())
    return hashlib.sha256(repr((str(folder), files)).encode()).hexdigest()[:12]
