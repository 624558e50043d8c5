"""Is a product in digits within its bound, whatever the rows, and used only where it is faster?"""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax.formats import Levels, nf4
from quantjax.ops import Probe, digits, fits_weight_only, weight_only, weight_only_dot
from quantjax.ops.digits import digits_dot, no_digits
from tests.daily import daily, dealt

from .reference import dot_general

INT8, INT4 = qj.IntFormat(8), qj.IntFormat(4)
HALF = qj.IntFormat(2, levels=Levels.HALF)
# Shape and summed axes: x @ w, x @ w.T, queries, attention's output and its transpose.
LAYOUTS = {
    "plain": ((256, 24), (0,)),
    "transposed": ((24, 256), (1,)),
    "heads": ((256, 3, 8), (0,)),
    "sum over heads": ((4, 64, 24), (0, 1)),
    "transposed heads": ((24, 4, 64), (1, 2)),
}
FAST = Probe("s8s8", (("s8s8", 1.0), ("float32", 2.6)))
SLOW = Probe("s8s8", (("s8s8", 1.0), ("float32", 2.4)))
FLOATS = Probe("float32", (("s8s8", 9.0), ("float32", 1.0)))
UNKNOWN = Probe("s8s8")


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Integers that are fast, and weights that are not too small."""
    monkeypatch.setattr(weight_only, "SMALL_WEIGHT", 0)
    found = [FAST]
    monkeypatch.setattr(digits, "probe", lambda: found[-1])
    weight_only._compiled.clear_cache()
    yield found
    weight_only._compiled.clear_cache()


in_digits = jax.jit(digits_dot, static_argnums=2)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def problem(layout, rows, form=INT8, *, per_channel=True, **spec):
    """x with its summed axes last, a weight, and the numbers of their product."""
    shape, axes = LAYOUTS[layout]
    free = 1 if per_channel else None
    block = tuple(None if a in axes else free for a in range(len(shape)))
    policy = qj.Policy([("w", qj.QuantSpec(format=form, block=block, **spec))])
    q = qj.quantize({"w": normal(*shape, seed=1)}, policy)["w"]
    x = normal(rows, *(shape[a] for a in axes))
    return x, q, ((tuple(range(1, x.ndim)), axes), ((), ()))


def check(got, x, q, numbers):
    """The bound of `digits_dot`, and 2 roundings of the values that are compared with."""
    w, x = np.asarray(qj.dequantize(q), np.float64), np.asarray(x, np.float64)
    expected, size = (dot_general(f(x), f(w), numbers) for f in (np.asarray, np.abs))
    summed, axes = numbers[0]
    largest = np.maximum(np.abs(x).max(summed), 2.0**-100).reshape(-1, *[1] * (size.ndim - 1))
    bound = 2.0**-24 * (1.1 * largest * np.abs(w).sum(axes) + (7 + 2) * size)
    assert got.shape == expected.shape and got.dtype == jnp.float32
    assert np.all(np.abs(got - expected) <= bound)


@pytest.mark.parametrize(
    "layout, form, per_channel",
    dealt(
        daily(LAYOUTS, ["plain", "sum over heads", "transposed heads"]),
        [INT8, INT4, HALF],
        [True, False],
    ),
)
def test_it_is_within_its_bound(layout, form, per_channel):
    x, q, numbers = problem(layout, 20, form, per_channel=per_channel)
    assert fits_weight_only(x, q, numbers) == "" == no_digits(q, numbers[0][1])
    check(weight_only_dot(x, q, numbers), x, q, numbers)
    compiled = in_digits(x, q, numbers[0][1])
    check(compiled, x, q, numbers)
    if layout == "plain":
        eager = digits_dot(x, q, numbers[0][1])
        check(eager, x, q, numbers)
        np.testing.assert_allclose(eager, compiled, rtol=1e-5, atol=1e-5)


def test_it_is_within_its_bound_on_rows_of_any_size():
    x, q, numbers = problem("plain", 12)
    x = np.array(x)
    x[0, 3], x[1], x[4], x[5], x[6, 0], x[7] = 1e4, 0, 1, -1, 3e37, 1e-42
    x[2:4] *= np.array([[1e30], [1e-35]], np.float32)
    # The largest number, with quotients that are rounded.
    for scale in map(np.float32, (1.0, 1.7, 0.3333333)):
        check(in_digits(x * scale, q, (0,)), x * scale, q, numbers)
    np.testing.assert_array_equal(in_digits(x, q, (0,))[1], 0)


def test_quotients_that_are_rounded_up_stay_three_digits():
    x = jnp.asarray(np.random.default_rng(0).uniform(1, 2, (20000, 1)), jnp.float32)
    q = qj.quantize({"kernel": jnp.ones((1, 1))}, "w8")["kernel"]
    for sign in (1, -1):
        y = in_digits(sign * x, q, (0,))
        np.testing.assert_allclose(y, sign * x * qj.dequantize(q), rtol=1e-6)


def test_sums_as_long_as_int32_holds():
    q = qj.quantize({"kernel": -jnp.ones((2**16, 1))}, "w8")["kernel"]
    q = dataclasses.replace(q, qvalue=jnp.full_like(q.qvalue, -128))
    # Digits of -128 too: this over the largest number of a row is -(2^15 + 2^7) / 8355710.
    x = jnp.full((1, 2**16), -32896 / 8355710, jnp.float32).at[0, 0].set(1.0)
    assert no_digits(q, (0,)) == ""
    check(in_digits(x, q, (0,)), x, q, (((1,), (0,)), ((), ())))


@pytest.mark.parametrize("layout", ["plain", "transposed"])
def test_a_row_with_nan_or_infinity_is_nan_and_the_others_are_not(layout):
    x, q, numbers = problem(layout, 20, INT4)
    x = x.at[0, 3].set(np.nan).at[1, 5].set(np.inf).at[2, 7].set(-np.inf)
    got, w = weight_only_dot(x, q, numbers), np.asarray(qj.dequantize(q))
    assert bool(jnp.isnan(got[:3]).all())
    np.testing.assert_allclose(
        got[3:], np.asarray(x[3:]) @ (w if layout == "plain" else w.T), atol=1e-4
    )


def test_no_nan_is_lost_in_a_large_array():
    x = jnp.ones((512, 1024)).at[300, 77].set(np.nan)
    q = qj.quantize({"kernel": jnp.ones((1024, 8))}, "w8")["kernel"]
    got = in_digits(x, q, (0,))
    np.testing.assert_array_equal(jnp.isnan(got).all(1), np.arange(512) == 300)


def has_integers(rows, layout="plain"):
    """Whether the compiled program has an integer product of these rows."""
    x, q, numbers = problem(layout, rows)
    weight_only._compiled.clear_cache()
    run = jax.jit(lambda x, q: weight_only_dot(x, q, numbers))
    return "s32[60," in run.lower(x, q).compile().as_text().replace(f"s32[{3 * rows},", "s32[60,")


def test_the_probe_decides_and_one_way_alone_is_compiled(fast):
    assert has_integers(20)
    assert not has_integers(7)  # few rows
    for found in (SLOW, FLOATS, UNKNOWN):
        fast.append(found)
        assert not has_integers(20)


def test_other_platforms_do_not_ask_the_probe(monkeypatch):
    x, q, numbers = problem("plain", 20)

    def never():
        raise AssertionError("probed")

    monkeypatch.setattr(digits, "probe", never)
    run = jax.jit(lambda x, q: weight_only_dot(x, q, numbers))
    text = jax.export.export(run, platforms=["cuda"])(x, q).mlir_module()
    assert not re.search(r"dot_general .*xi8>", text)
    with pytest.raises(AssertionError, match="probed"):
        run.lower(x, q)


def test_it_exports_to_three_platforms_at_once():
    x, q, numbers = problem("plain", 20, INT4)
    run = jax.jit(lambda x: weight_only_dot(x, q, numbers))
    data = jax.export.export(run, platforms=["cpu", "cuda", "tpu"])(x).serialize()
    np.testing.assert_allclose(jax.export.deserialize(data).call(x), run(x), rtol=1e-6)


def test_the_gradient_is_that_of_the_float_product():
    x, q, numbers = problem("plain", 20)
    got = jax.grad(lambda x: (weight_only_dot(x, q, numbers) ** 2).sum())(x)
    expected = jax.grad(lambda x: ((x @ qj.dequantize(q)) ** 2).sum())(x)
    np.testing.assert_allclose(got, expected, atol=2e-3)


def test_vmap_over_x_and_over_both():
    _, q, numbers = problem("plain", 1)
    x, w = normal(3, 20, 256), qj.dequantize(q)
    check(jax.vmap(lambda x: weight_only_dot(x, q, numbers))(x).reshape(60, -1),
          x.reshape(60, -1), q, numbers)  # fmt: skip
    stacked = jax.tree.map(lambda a: jnp.stack([a] * 3), q)
    both = jax.vmap(lambda x, q: weight_only_dot(x, q, numbers))(x, stacked)
    np.testing.assert_allclose(both, x @ w, atol=1e-4)


def test_what_is_not_served_says_why():
    specs = {
        "a zero point": dict(form=qj.IntFormat(8), symmetric=False),
        "nf4": dict(form=nf4),
        "half-integer levels of 8 bits": dict(form=qj.IntFormat(8, levels=Levels.HALF)),
    }
    for why, spec in specs.items():
        x, q, numbers = problem("plain", 20, **spec)
        assert why in no_digits(q, (0,))
        assert f"many rows (20 > 16) with {no_digits(q, (0,))}" == fits_weight_only(x, q, numbers)
    grouped = qj.quantize({"kernel": normal(256, 24)}, "w4g64")["kernel"]
    assert no_digits(grouped, (0,)) == "several scales along the sum"
    x, q, numbers = problem("plain", 20)
    why = fits_weight_only(x.astype(jnp.bfloat16), q, numbers)
    assert why == "many rows (20 > 16) in bfloat16 times float32"
    long = jax.eval_shape(lambda w: qj.quantize({"kernel": w}, "w8")["kernel"],
                          jax.ShapeDtypeStruct((2**16 + 1, 1), jnp.float32))  # fmt: skip
    assert no_digits(long, (0,)) == f"a sum of {math.prod(long.shape)} terms"
