"""The embedded set: 1,797 handwritten digits of 8x8 pixels and 17 grey levels.
Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998; as bundled with
scikit-learn, so nothing is downloaded."""

import numpy as np

from experiments.datasets.prepared import Splits, cached, prepare


def load_digits() -> tuple[Splits, int]:
    """Returns the one split `train`: images (1797, 8, 8, 1) in 0..255, ten classes.

    The levels 0..16 of the source are spread over 0..255: pixel = round(255 / 16 * level)."""

    def make(folder):
        from sklearn import datasets

        source = datasets.load_digits()
        images = np.round(source.images * (255 / 16)).astype(np.uint8)[..., None]
        splits = {"train": (images, source.target.astype(np.int32))}
        homepage = "https://archive.ics.uci.edu/dataset/80"
        return prepare("digits", splits, 10, folder, homepage=homepage)

    return cached("digits", make)
