"""How is the Hessian of a layer's error factored, when it may be singular or worse?
Frantar et al. 2022, arXiv:2210.17323, section 3.3 (damping); Chee et al. 2023, arXiv:2307.13304,
section 3.1 (the factor itself feeds errors back, no inverse is needed)."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

ATTEMPTS = 6  # from 0.01 to 1000 times the mean diagonal
# Of the highest precision: products of bfloat16 or TF32 would cost the last digits.
exact_product = functools.partial(jnp.matmul, precision="highest")
BLOCKS, DIRECT = (512, 128), 1024


class Factor(NamedTuple):
    """H / unit + damping * 1 = L L', with L lower triangular.

    unit: the mean of diag(H) over the inputs that were seen. damping: the share of it that was
    added in the end. ok: whether it could be factored at all; if not, L holds NaN.
    """

    lower_II: Float[Array, "i i"]
    unit: Float[Array, ""]
    damping: Float[Array, ""]
    ok: Bool[Array, ""]


def damped_cholesky(h_II: Float[Array, "i i"], damping: float = 0.01) -> Factor:
    """The Cholesky factor of H damped as little as it needs, from `damping` up by tens.

    An input that was never seen (H_jj = 0) has what is added alone on its diagonal: no error is
    fed to or from it. `ok` is false where H holds NaN or infinity, or is far from positive
    semidefinite.
    """
    n, diagonal_I, unit = len(h_II), jnp.diagonal(h_II), mean_diagonal(h_II)
    share = np.float32(1) / unit  # in these units float32 neither overflows nor vanishes

    def factor(added: jax.Array) -> jax.Array:
        # An unseen input gets 1 where nothing is added, or the damping could not be 0.
        added_I = jnp.where((diagonal_I == 0) & (added == 0), np.float32(1), added)
        return cholesky(h_II * share + jnp.where(jnp.eye(n, dtype=bool), added_I, 0))

    def failed(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        tried, _, lower_II = state
        return (tried < ATTEMPTS) & ~_finite(lower_II)

    def again(state: tuple[jax.Array, jax.Array, jax.Array]):
        tried, added, _ = state
        added = jnp.maximum(added * 10, np.float32(1e-4))
        return tried + 1, added, factor(added)

    start = jnp.float32(damping)
    state = (jnp.int32(1), start, factor(start))
    _, added, lower_II = lax.while_loop(failed, again, state)
    return Factor(lower_II, unit, added, _finite(lower_II))


def mean_diagonal(h_II: Float[Array, "i i"]) -> Float[Array, ""]:
    """The mean of diag(H) over the inputs that were seen; 1 if none was."""
    diagonal_I = jnp.diagonal(h_II)
    seen = (diagonal_I > 0).sum()
    return jnp.where(seen > 0, diagonal_I.sum() / jnp.maximum(seen, 1), np.float32(1))


def divided(w_OI: Float[Array, "o i"], factor: Factor) -> Float[Array, "o i"]:
    """w (H + damping)^-1; zeros where H could not be factored."""
    solve = functools.partial(lax.linalg.triangular_solve, factor.lower_II, lower=True)
    half_OI = solve(w_OI, transpose_a=True)
    return jnp.where(factor.ok, solve(half_OI) / factor.unit, 0)


def cholesky(a_II: Float[Array, "i i"]) -> Float[Array, "i i"]:
    """L of A = L L'; NaN from where A turns out not to be positive definite.

    A large A by blocks of two sizes, as LAPACK alone reaches a tenth of what matrix products do.
    Of A the lower half is read.
    """
    if len(a_II) <= DIRECT:
        return lax.linalg.cholesky(a_II, symmetrize_input=False)
    return _by_blocks(a_II, BLOCKS)


def _by_blocks(a_II: Float[Array, "i i"], blocks: tuple[int, ...]) -> Float[Array, "i i"]:
    if not blocks or len(a_II) <= blocks[-1]:
        return lax.linalg.cholesky(a_II, symmetrize_input=False)
    n, block = len(a_II), blocks[0]
    columns: list[jax.Array] = []  # of L, each from its diagonal block down
    for start in range(0, n, block):
        size = min(block, n - start)
        panel = a_II[start:, start : start + size]
        for k, before in enumerate(columns):
            rest = before[start - k * block :]
            panel = panel - exact_product(rest, rest[:size].T)
        own = _by_blocks(panel[:size], blocks[1:])
        columns.append(jnp.concatenate([own, exact_product(panel[size:], _inverse(own).T)]))
    padded = [jnp.pad(c, ((n - len(c), 0), (0, 0))) for c in columns]
    return jnp.concatenate(padded, axis=1)


def _inverse(lower_II: Float[Array, "i i"]) -> Float[Array, "i i"]:
    """Of a lower triangular matrix, by halves."""
    n = len(lower_II)
    if n <= BLOCKS[-1]:
        one = jnp.eye(n, dtype=jnp.float32)
        return lax.linalg.triangular_solve(lower_II, one, left_side=True, lower=True)
    half = n // 2
    first, last = _inverse(lower_II[:half, :half]), _inverse(lower_II[half:, half:])
    below = -exact_product(last, exact_product(lower_II[half:, :half], first))
    return jnp.block([[first, jnp.zeros((half, n - half), jnp.float32)], [below, last]])


def _finite(lower_II: Float[Array, "i i"]) -> Bool[Array, ""]:
    """A factorization that fails leaves NaN on the diagonal, from where it failed to the end."""
    return (jnp.diagonal(lower_II) > 0).all()
