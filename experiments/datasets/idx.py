"""MNIST and Fashion-MNIST from their original gzipped IDX files.
Format: LeCun, Cortes and Burges, "The MNIST database"; big-endian, two zero bytes, a type byte
(8 is uint8), the rank, the sizes, then the values. Fashion-MNIST: Xiao et al. 2017,
arXiv:1708.07747."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from experiments.datasets import sources
from experiments.datasets.prepared import Splits, cached, prepare

FILES = tuple(
    f"{split}-{kind}-ubyte.gz"
    for split in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
)
HOMEPAGES = {
    "mnist": "http://yann.lecun.com/exdb/mnist/",
    "fashion_mnist": "https://github.com/zalandoresearch/fashion-mnist",
}


def load_idx(name: str, data_dir: Path) -> tuple[Splits, int] | None:
    """Returns splits `train`, `test` of ten classes, or None if `data_dir` holds no file of them.

    Raises FileNotFoundError if only some of the files are there, ValueError if one is damaged."""
    folder = sources.find_folder((data_dir / name, data_dir), FILES)
    if folder is None:
        return None
    sources.require(folder, FILES)

    def make(scratch):
        train, test = (_split(folder, split) for split in ("train", "t10k"))
        splits = {"train": train, "test": test}
        return prepare(name, splits, 10, scratch, homepage=HOMEPAGES[name])

    return cached(f"{name}-{sources.digest(folder, FILES)}", make)


def read_idx(path: Path, *, rank: int) -> np.ndarray:
    """Reads one gzipped IDX file of uint8 with `rank` axes.

    Raises ValueError naming the file if it is not gzip, not IDX of that rank, or cut short."""
    try:
        raw = gzip.decompress(path.read_bytes())
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error}). Fetch it again.") from error
    magic = bytes((0, 0, 8, rank))
    if raw[:4] != magic:
        raise ValueError(
            f"{path}: starts with {raw[:4].hex(' ')}, an IDX file of uint8 and rank {rank} starts "
            f"with {magic.hex(' ')}. Is it the right file?"
        )
    start = 4 + 4 * rank
    if len(raw) < start:
        raise ValueError(f"{path}: ends within its header of {start} bytes. Fetch it again.")
    shape = tuple(np.frombuffer(raw[4:start], ">u4").tolist())
    values = np.frombuffer(raw, np.uint8, offset=start)
    if values.size != math.prod(shape):
        raise ValueError(
            f"{path}: holds {values.size} values, its header says {shape}. Fetch it again."
        )
    return values.reshape(shape)


def _split(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    images = read_idx(folder / f"{split}-images-idx3-ubyte.gz", rank=3)[..., None]
    labels = read_idx(folder / f"{split}-labels-idx1-ubyte.gz", rank=1).astype(np.int32)
    if len(images) != len(labels):
        raise ValueError(f"{folder}: {len(images)} {split} images but {len(labels)} labels.")
    if labels.max(initial=0) > 9:
        raise ValueError(f"{folder}: {split} labels reach {labels.max()}, expected 0 to 9.")
    return images, labels
