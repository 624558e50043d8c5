"""The product of two arrays in NumPy and float64, which compiles nothing."""

from string import ascii_letters
from typing import Any

import numpy as np


def dot_general(x: Any, w: Any, numbers: Any) -> np.ndarray:
    """`lax.dot_general`: shared axes first, then what is left of x, then what is left of w."""
    (x_summed, w_summed), (x_batch, w_batch) = numbers
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    of_x = list(ascii_letters[: x.ndim])
    of_w = list(ascii_letters[x.ndim : x.ndim + w.ndim])
    for i, j in zip((*x_summed, *x_batch), (*w_summed, *w_batch), strict=True):
        of_w[j] = of_x[i]
    shared = [of_x[i] for i in x_batch]
    out = shared + [a for a in of_x if a not in of_w] + [b for b in of_w if b not in of_x]
    return np.einsum(f"{''.join(of_x)},{''.join(of_w)}->{''.join(out)}", x, w)
