"""What does a listener hear of a wave? Energies of frequency bands, frame by frame, in logarithms.

Davis and Mermelstein, "Comparison of Parametric Representations for Monosyllabic Word Recognition
in Continuously Spoken Sentences", 1980; the mel of O'Shaughnessy, 1987, m = 2595 log10(1 + f/700).
"""

import numpy as np
from jaxtyping import Float, Int

FLOOR = 1e-6  # of an energy, so that silence has a logarithm


def log_mel(
    wave: Int[np.ndarray, "n"] | Float[np.ndarray, "n"],
    rate: int,
    *,
    window: int = 256,
    hop: int = 160,
    bands: int = 32,
) -> Float[np.ndarray, "t bands"]:
    """log(FLOOR + energy) of every band in every frame, float32; t = 1 + floor((n - window) / hop),
    at least 1. wave: in [-1, 1], or int16; rate in Hz; window and hop in samples.

    A frame is weighted by a Hann window; its energies |FFT|^2 / window are summed under triangles.
    Raises ValueError for an empty wave.

    >>> log_mel(np.zeros(8000, np.int16), 8000).shape
    (49, 32)
    """
    if not wave.size:
        raise ValueError("log_mel: the wave holds no sample.")
    scale = 2.0**15 if np.issubdtype(wave.dtype, np.integer) else 1.0
    samples = np.pad(wave / scale, (0, max(window - len(wave), 0)))
    frames_TN = np.lib.stride_tricks.sliding_window_view(samples, window)[::hop]
    energies_TF = np.abs(np.fft.rfft(frames_TN * np.hanning(window))) ** 2 / window
    return np.log(FLOOR + energies_TF @ triangles(rate, window, bands)).astype(np.float32)


def triangles(rate: int, window: int, bands: int) -> Float[np.ndarray, "f bands"]:
    """The weight of each frequency of the FFT in each band: corners lie at equal distances in mel
    from 0 to rate / 2, a band rises from the corner before its peak and falls to the one after.

    Raises ValueError where a band would hold no frequency of the FFT."""
    top = 2595 * np.log10(1 + rate / 2 / 700)
    corners = 700 * (10 ** (np.linspace(0, top, bands + 2) / 2595) - 1)
    f_F = np.fft.rfftfreq(window, 1 / rate)[:, None]
    left, peak, right = corners[:-2], corners[1:-1], corners[2:]
    weights = np.maximum(
        0, np.minimum((f_F - left) / (peak - left), (right - f_F) / (right - peak))
    )
    if not weights.any(0).all():
        raise ValueError(
            f"{bands} bands are too many for the {len(f_F)} frequencies of a window of {window}."
        )
    return weights
