"""What does GPTQ's own description give, taken at its word? NumPy, and SciPy's Cholesky factors.
Frantar et al. 2022, arXiv:2210.17323, algorithm 1: blocks of 128 columns, the inverse Hessian by
its upper Cholesky factor. The oracle of the tests, and the baseline of `bench_gptq`."""

from collections.abc import Callable

import numpy as np
import scipy.linalg

Round = Callable[[np.ndarray, int], np.ndarray]  # (values of one column, its index) -> on the grid


def gptq(
    w_OI: np.ndarray,
    h_II: np.ndarray,
    rounded: Round,
    *,
    damping: float = 0.01,
    act_order: bool = True,
    block: int = 128,
) -> np.ndarray:
    """The quantized weights, in the dtype of w_OI. An input that was never seen is rounded."""
    w_OI, h_II = w_OI.copy(), h_II.copy()
    n = len(h_II)
    diagonal = np.diag(h_II).copy()
    order = np.argsort(-diagonal, kind="stable") if act_order else np.arange(n)
    h_II[np.arange(n), np.arange(n)] += damping * diagonal[diagonal > 0].mean(dtype=h_II.dtype)
    w_OI, h_II = w_OI[:, order], h_II[order][:, order]
    lower = scipy.linalg.cholesky(h_II, lower=True)
    inverse = scipy.linalg.cho_solve((lower, True), np.eye(n, dtype=h_II.dtype))
    u_II = scipy.linalg.cholesky(inverse, lower=False)
    q_OI = np.zeros_like(w_OI)
    for start in range(0, n, block):
        stop = min(start + block, n)
        error = np.zeros((len(w_OI), stop - start), w_OI.dtype)
        for j in range(start, stop):
            q_OI[:, j] = rounded(w_OI[:, j], order[j])
            error[:, j - start] = (w_OI[:, j] - q_OI[:, j]) / u_II[j, j]
            w_OI[:, j:stop] -= np.outer(error[:, j - start], u_II[j, j:stop])
        w_OI[:, stop:] -= error @ u_II[start:stop, stop:]
    back = np.empty_like(q_OI)
    back[:, order] = q_OI
    return back
