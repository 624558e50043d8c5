"""How does a float matrix times a weight of integer codes run on a CPU's integer units? In digits.

A row of x is rounded to 24 bits, x = s (2^16 a_2 + 2^8 a_1 + a_0) with s = max|x| / 8355710 and
balanced digits a_i from -128 to 127. The digits of all rows meet the codes in one integer product,
which is exact, and sum_k x_k w_k = s s_w (2^16 A_2 + 2^8 A_1 + A_0) takes a few roundings. It is
three times the work of a float product, in integers that are more than three times as fast, and no
float copy of the weight is made. The splitting is that of Ozaki et al. 2012,
doi:10.1007/s11075-011-9478-1, with one side in codes already."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxtyping import Array, Bool, Float

from quantjax.affine import scale_values
from quantjax.blocks import counts, split
from quantjax.formats import IntFormat
from quantjax.observers import magnitude
from quantjax.ops.dot import LONGEST, along_output, integer_codes, level_factor
from quantjax.ops.integer import integer_dot_general
from quantjax.ops.probe import probe
from quantjax.ops.thresholds import DIGITS_SPEEDUP
from quantjax.qtensor import QTensor

_HALF = 0x808080  # makes digits unsigned: 128 in each of the three
# One less than the largest number of three balanced digits: x / s may be rounded up.
_LARGEST = np.float32(0x7F7F7F - 1)
_TINY = np.float32(2.0**-100)  # a smaller s would be subnormal, which CPUs may flush to zero


def no_digits(q: QTensor, axes: tuple[int, ...]) -> str:
    """Why `digits_dot` does not serve q summed over `axes`; empty if it does."""
    if not isinstance(q.format, IntFormat):
        return f"{q.format}, which is no integer"
    if q.zero_point is not None or not q.format.signed:
        return "a zero point"
    if not q.format.has_zero and q.format.bits == 8:
        return "half-integer levels of 8 bits"
    blocks = counts(q.shape, q.block)
    if any(blocks[a] > 1 for a in axes):
        return "several scales along the sum"
    terms = math.prod(q.shape[a] for a in axes)
    return f"a sum of {terms} terms" if terms > LONGEST else ""


def digits_dot(x: Float[Array, "m *k"], q: QTensor, axes: tuple[int, ...]) -> Float[Array, "m *n"]:
    """sum of x q over `axes` of q, for each row of x; NaN for a row with NaN or infinity.

    With u = 2^-24, |y - y_exact| <= u (1.1 max|x| sum_k |w_k| + 7 sum_k |x_k w_k|), however long
    the sum, where max|x| is of the row and at least 2^-100. Rounding to digits loses s / 2 <=
    1.01 u max|x| and u |x_k| in x / s. Three sums become floats and two additions follow, each
    with u of its size: A_2 2^16 is within (2^15 + 2^7) sum |w| = 0.004 max|x| / s sum |w| of the
    whole, and the others are smaller. So these lose 2 u |y| + 0.02 u max|x| sum |w|, and both
    scales u |y| each; a quantized scale may lose 2 u |y| more. `no_digits` must be empty.

    >>> import quantjax as qj
    >>> q = qj.quantize({"kernel": jnp.eye(2)}, "w8")["kernel"]
    >>> digits_dot(jnp.array([[1.0, 0.5]]), q, (0,)).round(5).tolist()
    [[1.0, 0.5]]
    """
    largest = magnitude(split(x, (1, *(None,) * (x.ndim - 1))))
    largest = jnp.where(jnp.isfinite(largest), largest, np.float32(np.nan))
    s = jnp.maximum(largest, _TINY).reshape(-1, *(1,) * (x.ndim - 1)) / _LARGEST
    number = jnp.round(x / s).astype(jnp.int32) + np.int32(_HALF)
    # The digit less 128, as int8; on an axis of their own, which is less to compile than rows.
    shifts = np.array([16, 8, 0], np.int32).reshape(3, *(1,) * x.ndim)
    digits = (number >> shifts).astype(jnp.uint8) ^ np.uint8(128)
    codes = lax.bitcast_convert_type(digits, jnp.int8).reshape(3 * len(x), *x.shape[1:])
    summed = tuple(range(1, x.ndim))
    numbers = ((summed, axes), ((), ()))
    sums = integer_dot_general(codes, integer_codes(q)[0], numbers).astype(jnp.float32)
    high, middle, low = jnp.split(sums, 3)
    y = high * np.float32(2**16) + (middle * np.float32(2**8) + low)
    # Scale by scale: their product may be too small for a float.
    y = y * (along_output(scale_values(q.scale), q, numbers) * level_factor(q))
    return y * s.reshape(-1, *(1,) * (y.ndim - 1))


def digits_pay() -> Bool[Array, ""]:
    """Whether integers are `DIGITS_SPEEDUP` times as fast as floats where this comes to run: a
    constant, for which a CPU is probed when the program is lowered. False on other platforms."""
    return digits_pay_p.bind()


digits_pay_p = Primitive("digits_pay")


@digits_pay_p.def_abstract_eval
def _abstract() -> Any:
    return jax.core.ShapedArray((), jnp.bool_)


def _lower(ctx: Any) -> Any:
    return mlir.lower_fun(lambda: jnp.bool_(False), multiple_results=False)(ctx)


def _lower_on_cpu(ctx: Any) -> Any:
    found = probe()
    times = dict(found.milliseconds)
    pay = found.form in times and times.get("float32", 0) >= DIGITS_SPEEDUP * times[found.form]
    return mlir.lower_fun(lambda: jnp.bool_(pay), multiple_results=False)(ctx)


mlir.register_lowering(digits_pay_p, _lower)
mlir.register_lowering(digits_pay_p, _lower_on_cpu, platform="cpu")
