"""Which orthogonal matrix spreads one large entry over all? A Hadamard matrix with random signs.

H H^T = n I with entries of 1 and -1. Sylvester 1867 doubles one; Paley 1933 gives orders q + 1 and
2 (q + 1) for primes q of the form 4k + 3 and 4k + 1, from which squares are. Random signs: QuaRot
(Ashkboos et al. 2024, arXiv:2404.00456) after QuIP# (Tseng et al. 2024, arXiv:2402.04396)."""

import functools

import numpy as np
from jaxtyping import Float


@functools.cache
def hadamard(n: int) -> Float[np.ndarray, "n n"] | None:
    """A matrix of 1 and -1 with orthogonal rows; None for orders without a construction here.

    >>> hadamard(2).tolist()
    [[1.0, 1.0], [1.0, -1.0]]
    >>> [k for k in range(4, 61, 4) if hadamard(k) is None]
    [52]
    """
    if n < 1:
        raise ValueError(f"hadamard: expected a positive order, got {n}.")
    if n == 1:
        return np.ones((1, 1))
    half = hadamard(n // 2) if n % 2 == 0 else None
    if half is not None:
        return np.block([[half, half], [half, -half]])
    if n % 4 == 0 and _is_prime(n - 1):
        return _paley_one(n - 1)
    if n % 4 == 0 and _is_prime(n // 2 - 1) and (n // 2 - 1) % 4 == 1:
        return _paley_two(n // 2 - 1)
    return None


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, int(q**0.5) + 1))


def _jacobsthal(q: int) -> Float[np.ndarray, "q q"]:
    """Q_ij = 1 where i - j is a square modulo q, -1 where it is none, 0 on the diagonal."""
    character = np.full(q, -1.0)
    character[np.arange(1, q) ** 2 % q] = 1.0
    character[0] = 0.0
    i = np.arange(q)
    return character[(i[:, None] - i) % q]


def _paley_one(q: int) -> Float[np.ndarray, "n n"]:
    s = np.zeros((q + 1, q + 1))  # skew: H = I + S
    s[0, 1:], s[1:, 0], s[1:, 1:] = 1.0, -1.0, _jacobsthal(q)
    return np.eye(q + 1) + s


def _paley_two(q: int) -> Float[np.ndarray, "n n"]:
    c = np.zeros((q + 1, q + 1))  # symmetric conference matrix
    c[0, 1:], c[1:, 0], c[1:, 1:] = 1.0, 1.0, _jacobsthal(q)
    return np.kron(c, [[1.0, 1.0], [1.0, -1.0]]) + np.kron(
        np.eye(q + 1), [[1.0, -1.0], [-1.0, -1.0]]
    )


def random_hadamard(n: int, rng: np.random.Generator) -> tuple[Float[np.ndarray, "n n"], str]:
    """diag(random signs) H / sqrt(n), orthogonal, and an empty remark; where no H is known, a
    uniformly random orthogonal matrix and a remark that says so."""
    h = hadamard(n)
    if h is None:
        return random_orthogonal(n, rng), f"no Hadamard matrix of order {n} is known here"
    return rng.choice([-1.0, 1.0], n)[:, None] * h / n**0.5, ""


def random_orthogonal(n: int, rng: np.random.Generator) -> Float[np.ndarray, "n n"]:
    """Uniform among orthogonal matrices (Mezzadri 2007, arXiv:math-ph/0609050)."""
    q, r = np.linalg.qr(rng.normal(size=(n, n)))
    return q * np.sign(np.diag(r))


def random_keeping_sum(n: int, rng: np.random.Generator) -> Float[np.ndarray, "n n"]:
    """Uniform among the orthogonal matrices that leave the vector of ones as it is."""
    # The reflection that takes the first unit vector to ones / sqrt(n).
    v = np.full(n, -(n**-0.5))
    v[0] += 1.0
    if n == 1:
        return np.ones((1, 1))
    u = np.eye(n) - 2 * np.outer(v, v) / (v @ v)
    inner = np.eye(n)
    inner[1:, 1:] = random_orthogonal(n - 1, rng)
    return u @ inner @ u.T
