"""The sequences a recurrent network is trained on, tuned on and tested on, as arrays, by name.

`spoken_digits`: 3,000 recordings of the digits by six speakers, 8 kHz; Jackson et al., "Free Spoken
Digit Dataset", 2018. `japanese_vowels`: which of nine men says two vowels, 12 cepstral coefficients
a frame; Kudo, Toyama and Shimbo, "Multidimensional curve classification using passing-through
regions", 1999."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from experiments.datasets.sources import find_folder
from experiments.mel import log_mel

Frames = Float[np.ndarray, "n t channels"]
Labels = Int[np.ndarray, "n"]
FILES = {"spoken_digits": "fsdd_8khz.npz", "japanese_vowels": "japanese_vowels.npz"}
FOLDERS = {"spoken_digits": ("fsdd", "spoken_digits"), "japanese_vowels": ("japanese_vowels",)}
RATE = 8000  # Hz
STEPS = 64  # of 20 ms; four recordings are longer, and are cut there
HELD_OUT = 5  # recordings of each speaker (and digit) for validation


@dataclasses.dataclass(frozen=True, eq=False)
class Sequences:
    """Sequences of frames, float32, and their classes, in three parts; the fields are named as the
    shared loop knows them. The last channel is 1 where there is a frame, 0 in the padding behind.

    mean, std: of the training frames, one for each of the other channels."""

    name: str
    classes: int
    train_images: Frames
    train_labels: Labels
    validation_images: Frames
    validation_labels: Labels
    test_images: Frames
    test_labels: Labels
    mean: Float[np.ndarray, "c"]
    std: Float[np.ndarray, "c"]

    def normalize(self, frames: Frames | Float[Array, "n t c"]) -> Float[Array, "n t c"]:
        """(frame - mean) / std; the padding is zero, the last channel as it was."""
        frames = jnp.asarray(frames)
        there = frames[..., -1:]
        return jnp.concatenate([there * (frames[..., :-1] - self.mean) / self.std, there], -1)


def load(name: str, *, data_dir: Path) -> Sequences:
    """Reads the set from its file in `data_dir`, or in a folder of the set's name there.

    Spoken digits are log-mel frames of 32 ms every 20 ms. Their test part is the official one, the
    first five recordings of each digit by each speaker; the next five are for validation. Of the
    vowels, the last five training sequences of each speaker are.
    Raises ValueError for an unknown name or a damaged file, FileNotFoundError naming the files."""
    if name not in FILES:
        raise ValueError(f"unknown sequences {name!r}: expected one of {', '.join(FILES)}.")
    tried = (data_dir, *(data_dir / folder for folder in FOLDERS[name]))
    folder = find_folder(tried, [FILES[name]])
    if folder is None:
        files = ", ".join(str(home / FILES[name]) for home in tried)
        raise FileNotFoundError(
            f"{name}: none of {files}. Pass the folder of the file as --data-dir."
        )
    read = _spoken_digits if name == "spoken_digits" else _japanese_vowels
    path = folder / FILES[name]
    with np.load(path) as arrays:
        try:
            frames, labels, parts, classes = read({k: arrays[k] for k in arrays.files})
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path}: not the arrays of {name} ({error}).") from error
    train, valid, test = (
        (frames[parts == part], labels[parts == part]) for part in ("train", "valid", "test")
    )
    known = train[0][train[0][..., -1] > 0][:, :-1]
    mean, std = (known.mean(0, np.float64), known.std(0, dtype=np.float64))
    return Sequences(
        name, classes, *train, *valid, *test, mean.astype(np.float32), std.astype(np.float32)
    )


def padded(frames: Sequence[Float[np.ndarray, "_ c"]], steps: int) -> Frames:
    """One array of all, cut to `steps` frames each, with the channel that says where frames are.

    Raises ValueError for a sequence without frames.

    >>> padded([np.ones((1, 2)), np.ones((5, 2))], 3)[..., -1].tolist()
    [[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    """
    out = np.zeros((len(frames), steps, frames[0].shape[1] + 1), np.float32)
    for i, one in enumerate(frames):
        if not len(one):
            raise ValueError(f"sequence {i} holds no frame")
        count = min(len(one), steps)
        out[i, :count, :-1], out[i, :count, -1] = one[:count], 1
    return out


Read = tuple[Frames, Labels, np.ndarray, int]  # the third: a part's name for each


def _spoken_digits(arrays: dict[str, np.ndarray]) -> Read:
    audio, offset, index = (arrays[k] for k in ("audio", "offset", "index"))
    if len(offset) != len(index) + 1 or offset[-1] != len(audio):
        raise ValueError(f"{len(index)} recordings, offsets to {offset[-1]} of {len(audio)}")
    waves = [audio[a:b] for a, b in zip(offset, offset[1:], strict=False)]
    frames = padded([log_mel(wave, RATE) for wave in waves], STEPS)
    parts = np.where(index < 5, "test", np.where(index < 5 + HELD_OUT, "valid", "train"))
    return frames, arrays["label"].astype(np.int32), parts, 10


def _japanese_vowels(arrays: dict[str, np.ndarray]) -> Read:
    frames, labels, parts = [], [], []
    for part in ("train", "test"):
        x, length, y = (arrays[f"{k}_{part}"] for k in ("x", "len", "y"))
        frames += [one[:count] for one, count in zip(x, length, strict=True)]
        labels.append(y.astype(np.int32))
        # How many of the same speaker follow.
        after = np.array([(y[i + 1 :] == y[i]).sum() for i in range(len(y))])
        held = (after < HELD_OUT) & (part == "train")
        parts.append(np.where(held, "valid", part))
    steps = max(map(len, frames))
    return padded(frames, steps), np.concatenate(labels), np.concatenate(parts), 9
