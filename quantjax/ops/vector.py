"""How does a vector times a matrix of integer codes run as fast as codes come from memory?

XLA's product would lay the matrix out anew, and its sums over an axis are scalar code, but its
elementwise loops are vectorized and threaded. So y_n = sum_k x_k w_kn is cut in partial sums whose
few terms are written out: P_bn = sum_{j<J} x_bj w_bjn is one elementwise loop, which turns codes
into floats in registers, and sum_b P_bn a product with ones over J times less than the weight.

All is float32. The levels of codes are exact there, and so is their difference with a zero point;
a group's scale multiplies partial sums. So the error is that of the float product.

Where x are codes too, partial sums are integers: they are added in float32 as long as that is
exact, then as int32. So the product of codes is exact (`integer_vector_dot`)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int8, Int32

from quantjax.formats import IntFormat
from quantjax.ops.codes import CodeMatrix, as_matrix, group_of
from quantjax.ops.forms import EXACT, Codes
from quantjax.ops.thresholds import PACKED_TERMS, TERMS
from quantjax.qtensor import QTensor

_LANES = 16  # float32 in the widest vector of a CPU


def count_terms(q: QTensor, axes: tuple[int, ...]) -> int:
    """How many terms `vector_dot` writes out; 0 if it does not serve q summed over `axes`.

    It serves integer codes (`quantjax.ops.codes`) whose groups the terms divide; in a sum over
    the last axes the terms come from several groups, and divide their number."""
    group = group_of(q, axes)
    if not group:
        return 0
    length, bits = math.prod(q.shape[a] for a in axes), q.format.bits
    most, per = (TERMS, 1) if q.packed is None else (PACKED_TERMS, 8 // math.gcd(8, bits))
    if axes[0] == 0:
        run = group
    elif 8 % bits or group % per or group < _LANES * per:
        return 0  # several codes of 3 bytes in a row, or short groups, are no vector
    else:
        run = length // group * per if group < length else length // _LANES
    return next((n for n in (most, most // 2, most // 4) if run % n == 0 and n % per == 0), 0)


def vector_dot(x: Float[Array, "*k"], q: QTensor, axes: tuple[int, ...]) -> Float[Array, "*n"]:
    """sum of x q over `axes` of q, its first or its last ones. `count_terms` must not be 0."""
    over = _over_rows if axes[0] == 0 else _over_columns
    y = over(x.reshape(-1), as_matrix(q, axes), count_terms(q, axes))
    return y.reshape([n for a, n in enumerate(q.shape) if a not in axes])


def count_code_terms(length: int) -> int:
    """How many terms of a sum of `length` codes `integer_vector_dot` writes out; 0 if none."""
    return next((n for n in (TERMS, TERMS // 2, TERMS // 4) if length and length % n == 0), 0)


def integer_vector_dot(x_K: Codes, w_KN: Int8[Array, "k n"]) -> Int32[Array, " n"]:
    """sum_k x_k w_kn in int32, exactly. `count_code_terms` must not be 0.

    A partial sum is an integer, and so is a sum of several. Of `forms.EXACT` codes it is below
    2^24, so that float32 holds it and all that leads to it, in any order; int32 holds the rest.
    """
    count = count_code_terms(len(x_K))
    w = CodeMatrix(w_KN, jnp.ones((1, 1), jnp.float32), None, IntFormat(8), 1, 1)
    partial_PN = _partial_over_rows(x_K.astype(jnp.float32), w, count)
    # One product adds up as many as is exact, for each row of ones in blocks down a diagonal.
    most = EXACT[np.dtype(x_K.dtype)] // count
    of_row = np.arange(len(partial_PN)) // most
    ones_RP = jnp.asarray(of_row == np.arange(of_row[-1] + 1)[:, None], jnp.float32)
    sums_RN = jnp.matmul(ones_RP, partial_PN, precision=lax.Precision.HIGHEST)
    return jnp.sum(sums_RN.astype(jnp.int32), 0)


def _total(terms: list[jax.Array]) -> jax.Array:
    """Their sum by pairs, whose rounding error grows with the logarithm of their number."""
    while len(terms) > 1:
        pairs = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + terms[len(pairs) * 2 :]
    return terms[0]


def _over_rows(x_K: jax.Array, w: CodeMatrix, count: int) -> jax.Array:
    partial = _partial_over_rows(x_K, w, count)
    y_N = jnp.ones(len(partial), jnp.float32) @ partial
    return y_N if len(w.scale) > 1 else y_N * w.scale[0]


def _partial_over_rows(x_K: jax.Array, w: CodeMatrix, count: int) -> jax.Array:
    """Sums of `count` terms, one below the other; of several groups scaled, of one alone not."""
    # G groups, B blocks in each of them, Q bytes in each block, N columns
    groups, columns, stored = len(w.scale), w.stored.shape[1], count * w.format.bits // 8
    codes_GBQN = w.stored.reshape(groups, -1, stored, columns)
    x_GBK = x_K.reshape(groups, -1, count, 1)
    levels = w.levels([codes_GBQN[:, :, i] for i in range(stored)])
    if w.zero is not None:
        levels = [level - w.zero[:, None] for level in levels]
    partial_GBN = _total([x_GBK[:, :, i] * level for i, level in enumerate(levels)])
    if groups > 1:
        partial_GBN = partial_GBN * w.scale[:, None]
    return partial_GBN.reshape(-1, columns)


def _over_columns(x_K: jax.Array, w: CodeMatrix, count: int) -> jax.Array:
    # The sum as T parts of G groups (or of one part of the only group) of Q bytes
    columns, groups = w.scale.shape
    parts = count // w.unit
    inner = groups // parts if groups > 1 else 1
    codes_NTGQ = w.stored.reshape(columns, parts, inner, -1)
    x_TGQU = x_K.reshape(parts, inner, -1, w.unit)
    scale_NTG = w.scale.reshape(columns, -1, inner, 1)
    zero_NTG = None if w.zero is None else w.zero.reshape(columns, -1, inner, 1)
    terms = []
    for t in range(parts):
        levels = w.levels([codes_NTGQ[:, t]])
        if zero_NTG is not None:
            levels = [level - zero_NTG[:, t if groups > 1 else 0] for level in levels]
        part = [x_TGQU[t, :, :, u] * level for u, level in enumerate(levels)]
        terms += [_total(part) * scale_NTG[:, t]] if groups > 1 else part
    partial = _total(terms).reshape(columns, -1)
    y_N = partial @ jnp.ones(partial.shape[1], jnp.float32)
    return y_N if groups > 1 else y_N * w.scale[:, 0]
