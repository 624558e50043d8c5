"""Do the formats hold the numbers that their standards and papers say?"""

import fractions
import math

import hypothesis.strategies as st
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings

from quantjax import affine, formats
from quantjax.formats import (
    Codebook,
    ExponentFormat,
    FloatFormat,
    IntFormat,
    Levels,
    ScaleRule,
    Specials,
    apot,
)
from quantjax.kmeans import fit_levels
from quantjax.spec import QuantSpec
from tests.daily import daily, dealt

ALL_INTS = [
    IntFormat(bits, signed, levels)
    for bits in range(1, 9)
    for signed, levels in [
        (True, Levels.NARROW),
        (True, Levels.FULL),
        (True, Levels.HALF),
        (False, Levels.FULL),
    ]
    if (bits, signed, levels) != (1, True, Levels.NARROW)
]
FLOATS = {  # ours, its independent implementation
    "e4m3": (formats.e4m3, ml_dtypes.float8_e4m3fn),
    "e5m2": (formats.e5m2, ml_dtypes.float8_e5m2),
    "e3m2": (formats.e3m2, ml_dtypes.float6_e3m2fn),
    "e2m3": (formats.e2m3, ml_dtypes.float6_e2m3fn),
    "e2m1": (formats.e2m1, ml_dtypes.float4_e2m1fn),
}
# Dettmers et al. 2023 (QLoRA), arXiv:2305.14314, appendix E: the exact NF4 values.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def normal_quantiles(n: int) -> np.ndarray:
    """A stratified normal sample: the quantiles at (i + 1/2) / n, less noisy than random ones."""
    from statistics import NormalDist

    ppf = NormalDist().inv_cdf
    half = np.array([ppf((i + 0.5) / n) for i in range(n // 2)])
    return np.concatenate([half, -half[::-1]])


def nearest_index(v: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Brute force: the index of the nearest level; the lower one on a tie."""
    return np.argmin(np.abs(v[:, None].astype(np.float64) - grid.astype(np.float64)), axis=1)


# Integers.


@pytest.mark.parametrize("fmt", ALL_INTS, ids=str)
def test_integer_grid_is_what_the_convention_says(fmt):
    top = 2 ** (fmt.bits - 1)
    expected = {
        (True, Levels.FULL): range(-top, top),
        (True, Levels.NARROW): range(-top + 1, top),
        (True, Levels.HALF): [k + 0.5 for k in range(-top, top)],
        (False, Levels.FULL): range(2 * top),
    }[fmt.signed, fmt.levels]
    np.testing.assert_array_equal(fmt.grid, np.array(expected, np.float32))
    assert fmt.lowest == fmt.grid[0]
    assert fmt.max_level == (fmt.grid[-1] or -fmt.grid[0])  # one full bit: -1 and 0
    assert fmt.has_zero == (0.0 in fmt.grid)
    codes = jnp.arange(fmt.qmin, fmt.qmax + 1)
    np.testing.assert_array_equal(fmt.decode(codes), fmt.grid)
    np.testing.assert_array_equal(fmt.encode(jnp.asarray(fmt.grid)), codes)


@pytest.mark.parametrize("fmt", ALL_INTS, ids=str)
def test_integer_encode_takes_the_nearest_level(fmt):
    v = np.random.default_rng(0).uniform(-300, 300, 500)
    v = np.concatenate([v, v / 2**fmt.bits, [1e5, -1e5]]).astype(np.float32)
    np.testing.assert_array_equal(fmt.encode(jnp.asarray(v)), nearest_index(v, fmt.grid) + fmt.qmin)


def test_integer_ties_go_to_the_even_code():
    v = jnp.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert IntFormat(4).encode(v).tolist() == [-2, -2, 0, 0, 2, 2]


def test_half_levels_hold_the_cell_and_zero_goes_up():
    v = jnp.array([-1.0, -0.0, 0.0, 0.999, 1.0])
    assert IntFormat(4, levels=Levels.HALF).encode(v).tolist() == [-1, 0, 0, 0, 1]


def test_binary_and_ternary_are_integer_formats():
    assert formats.binary.grid.tolist() == [-0.5, 0.5]
    assert formats.ternary.grid.tolist() == [-1, 0, 1]
    assert (formats.binary.bits, formats.ternary.bits) == (1, 2)
    assert str(formats.binary) == "binary" and str(formats.ternary) == "ternary"


@pytest.mark.parametrize("bits", [0, 9, -1, 2.5, "4", None, True])
def test_bad_bits_raise(bits):
    with pytest.raises(ValueError, match="bits must be an integer from 1 to 8"):
        IntFormat(bits)
    with pytest.raises(ValueError, match="bits must be an integer"):
        Codebook(learned_bits=bits if bits is not None else 0)


def test_grids_that_do_not_exist_raise():
    with pytest.raises(ValueError, match="narrow"):
        IntFormat(1)
    with pytest.raises(ValueError, match="signed"):
        IntFormat(4, signed=False, levels=Levels.HALF)
    with pytest.raises(ValueError, match="ascend"):
        Codebook((0.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="2 to 256"):
        Codebook((1.0,))
    with pytest.raises(ValueError, match="finite"):
        Codebook((0.0, math.inf))
    with pytest.raises(ValueError, match="2 to 8"):
        FloatFormat(5, 3)
    with pytest.raises(ValueError, match="finite number"):
        FloatFormat(1, 0, Specials.IEEE)


def test_formats_are_values():
    assert IntFormat(4) == IntFormat(4) and hash(IntFormat(4)) == hash(IntFormat(4))
    assert IntFormat(4, False) == IntFormat(4, False, Levels.FULL)
    assert len({*ALL_INTS, *(f for f, _ in FLOATS.values()), formats.nf4}) == len(ALL_INTS) + 6


# Floating point.


@pytest.mark.parametrize("fmt, other", FLOATS.values(), ids=FLOATS)
def test_float_decode_equals_ml_dtypes_on_every_code(fmt, other):
    codes = np.arange(2**fmt.bits, dtype=np.uint8)
    expected = codes.view(other).astype(np.float32)
    finite = np.isfinite(expected)  # codes that stand for NaN or infinity are never produced
    got = np.asarray(fmt.decode(jnp.asarray(codes)))
    np.testing.assert_array_equal(got[finite], expected[finite])
    np.testing.assert_array_equal(np.signbit(got[finite]), np.signbit(expected[finite]))
    np.testing.assert_array_equal(fmt.grid, np.unique(expected[finite]))
    assert fmt.max_level == ml_dtypes.finfo(other).max
    back = np.asarray(fmt.encode(jnp.asarray(got[finite])))
    np.testing.assert_array_equal(back, codes[finite])


@pytest.mark.parametrize("fmt, other", FLOATS.values(), ids=FLOATS)
def test_float_encode_equals_ml_dtypes_in_every_bit(fmt, other):
    rng = np.random.default_rng(0)
    grid = fmt.grid.astype(np.float64)
    ties = (grid[1:] + grid[:-1]) / 2
    v = np.concatenate(
        [
            rng.normal(size=4000) * fmt.max_level / 3,
            np.exp(rng.uniform(-60, 60, 2000)) * rng.choice([-1, 1], 2000),
            grid,
            ties,
            np.nextafter(np.float32(ties), np.float32(np.inf)),
            np.nextafter(np.float32(ties), np.float32(-np.inf)),
            [0.0, -0.0, 1e-30, -1e-30, 3e38, -3e38, np.inf, -np.inf],
        ]
    ).astype(np.float32)
    # ml_dtypes overflows e4m3 to NaN and e5m2 to infinity; quantizing saturates.
    top = np.float32(fmt.max_level)
    expected = np.clip(v, -top, top).astype(other).view(np.uint8)
    np.testing.assert_array_equal(fmt.encode(jnp.asarray(v)), expected)


@settings(max_examples=12)
@given(st.integers(1, 6), st.integers(0, 6), st.sampled_from(Specials), st.integers(0, 99))
def test_any_float_format_takes_the_nearest_level(exponent, mantissa, specials, seed):
    if not 2 <= 1 + exponent + mantissa <= 8:
        return
    try:
        fmt = FloatFormat(exponent, mantissa, specials)
    except ValueError:
        return
    v = np.random.default_rng(seed).normal(size=200).astype(np.float32) * np.float32(fmt.max_level)
    got = fmt.decode(fmt.encode(jnp.asarray(v)))
    np.testing.assert_array_equal(got, fmt.grid[nearest_index(v, fmt.grid)])


# Codebooks.


def test_nf4_is_the_table_of_qlora():
    # 1e-6: the paper's table was computed in float32 and printed as such.
    np.testing.assert_allclose(formats.nf4.grid, NF4, rtol=0, atol=1e-6)
    assert formats.nf4.bits == 4 and formats.nf4.has_zero


@pytest.mark.parametrize(
    "bits, magnitudes",
    # Li et al. 2020, eq. 5, by hand. 4 bits: {0, 1/2, 1/4, 1/16} + {0, 1/8}, in sixteenths over
    # the largest, 10. 5 bits: {0, 1/2, 1/8, 1/32} + {0, 1/4, 1/16, 1/64}, in 64ths over 48.
    [
        (2, [0, 1]),
        (3, [0, 1 / 4, 1 / 2, 1]),
        (4, [n / 10 for n in (0, 1, 2, 3, 4, 6, 8, 10)]),
        (5, [n / 48 for n in (0, 1, 2, 3, 4, 6, 8, 9, 12, 16, 18, 24, 32, 33, 36, 48)]),
    ],
)
def test_apot_levels_worked_by_hand(bits, magnitudes):
    expected = sorted({*magnitudes, *(-m for m in magnitudes)})
    np.testing.assert_array_equal(apot(bits).grid, np.array(expected, np.float32))
    assert apot(bits).bits == bits


def test_unsigned_apot_levels_worked_by_hand():
    # 4 bits: {0, 1/2, 1/8, 1/32} + {0, 1/4, 1/16, 1/64}, the magnitudes of 5 signed bits.
    np.testing.assert_array_equal(apot(2, signed=False).grid, np.float32([0, 0.25, 0.5, 1]))
    np.testing.assert_array_equal(apot(4, signed=False).grid, apot(5).grid[15:])
    assert [apot(bits, signed=False).bits for bits in range(2, 9)] == list(range(2, 9))


@pytest.mark.parametrize(
    "fmt", [formats.nf4, apot(3), apot(8), Codebook((-3.0, 1.0, 1.5))], ids=str
)
def test_codebook_takes_the_nearest_level_and_ties_go_down(fmt):
    rng = np.random.default_rng(0)
    middle = np.float32(0.5) * (fmt.grid[1:] + fmt.grid[:-1])
    v = np.concatenate([rng.uniform(-4, 4, 500), fmt.grid]).astype(np.float32)
    # Values too near a tie to be decided in float32 are left out.
    v = v[np.abs(v[:, None] - middle).min(1) > 1e-6]
    np.testing.assert_array_equal(fmt.encode(jnp.asarray(v)), nearest_index(v, fmt.grid))
    np.testing.assert_array_equal(fmt.encode(jnp.asarray(middle)), np.arange(len(middle)))
    np.testing.assert_array_equal(fmt.decode(jnp.arange(len(fmt.grid))), fmt.grid)


def lloyd(v: np.ndarray, w: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, float]:
    """Weighted k-means on the line in float64, to convergence: (levels, weighted error)."""
    for _ in range(3000):
        near = np.searchsorted((levels[1:] + levels[:-1]) / 2, v)
        mass = np.bincount(near, w, len(levels))
        sums = np.bincount(near, w * v, len(levels))
        new = np.where(mass > 0, sums / np.where(mass > 0, mass, 1), levels)
        if np.array_equal(new, levels):
            break
        levels = new
    near = np.searchsorted((levels[1:] + levels[:-1]) / 2, v)
    return levels, float((w * (v - levels[near]) ** 2).sum())


@pytest.mark.parametrize("bits, weighted", dealt([1, 3], [False, True]))
def test_kmeans_is_as_good_as_a_slow_lloyd(bits, weighted):
    rng = np.random.default_rng(bits)
    v = rng.normal(size=3000)
    v /= np.abs(v).max()
    w = np.exp(rng.normal(size=3000)) * (v > 0) if weighted else np.ones(3000)
    starts = [np.quantile(v, (np.arange(2**bits) + 0.5) / 2**bits)]
    starts += [np.sort(rng.choice(v[w > 0], 2**bits, replace=False)) for _ in range(8)]
    best = min(lloyd(v, w, start)[1] for start in starts)
    levels = np.asarray(
        fit_levels(jnp.asarray(v, jnp.float32), jnp.asarray(w, jnp.float32), bits), np.float64
    )
    assert np.all(np.diff(levels) > 0)
    near = np.searchsorted((levels[1:] + levels[:-1]) / 2, v)
    # Local optima differ; 2 % holds whichever one the best restart finds.
    assert (w * (v - levels[near]) ** 2).sum() <= 1.02 * best


@pytest.mark.parametrize(
    "case", daily([(2, 0.1175), (3, 0.0345), (4, 0.0095), (5, 0.0025)], [(3, 0.0345)])
)
def test_kmeans_reaches_the_lloyd_max_floor(case):
    """Max 1960, "Quantizing for minimum distortion", table I: mean squared error for N(0, 1)."""
    bits, floor = case
    x = jnp.asarray(normal_quantiles(100_000), jnp.float32)
    spec = QuantSpec(format=Codebook.learned(bits), block=(None,))
    y = affine.fake_quantize_array(x, affine.find_scales(x, spec), spec=spec)
    error = float(jnp.mean((x - y) ** 2))
    # 1 % plus half a unit of the last printed digit.
    assert abs(error - floor) <= 0.01 * floor + 0.00005


def test_weighted_kmeans_serves_the_weights():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)), jnp.float32)
    w = jnp.where(x > 0.5, 10.0, 0.1)
    spec = QuantSpec(format=Codebook.learned(3), block=(None, None))

    def weighted_error(scales):
        return float(jnp.sum(w * (x - affine.fake_quantize_array(x, scales, spec=spec)) ** 2))

    fitted = weighted_error(affine.find_scales(x, spec, w))
    assert fitted < 0.5 * weighted_error(affine.find_scales(x, spec))


# Microscaling and nested scales.


def mx_exponent(m: float, fmt: FloatFormat, rule: ScaleRule) -> int:
    """The exponent of the scale, from the definition, in exact arithmetic."""

    def floor_log2(v: fractions.Fraction) -> int:
        e = v.numerator.bit_length() - v.denominator.bit_length()
        return e if v >= fractions.Fraction(2) ** e else e - 1

    exact, top = fractions.Fraction(float(m)), fractions.Fraction(fmt.max_level)
    if rule is ScaleRule.CEIL:  # the least e with m <= M 2^e
        e = floor_log2(exact / top)
        return e if exact <= top * fractions.Fraction(2) ** e else e + 1
    if rule is ScaleRule.EVEN:  # to `mantissa` bits behind the point, halves up
        unit = fractions.Fraction(2) ** (floor_log2(exact) - fmt.mantissa)
        exact = unit * math.floor(exact / unit + fractions.Fraction(1, 2))
    return floor_log2(exact) - floor_log2(top)


@pytest.mark.parametrize("name, rule", dealt(["e2m1", "e4m3", "e5m2", "e3m2", "e2m3"], ScaleRule))
def test_mx_scales_follow_the_rules(name, rule):
    fmt = FLOATS[name][0]
    rng = np.random.default_rng(0)
    amax = np.concatenate(
        [
            2.0 ** np.arange(-60, 60, 7),
            1.75 * 2.0 ** np.arange(-9, 9),  # where EVEN rounds e2m1 up
            fmt.max_level * 2.0 ** np.arange(-9, 9),  # where CEIL steps
            np.exp(rng.normal(size=100) * 9),
        ]
    ).astype(np.float32)
    amax = np.concatenate(
        [amax, np.nextafter(amax, np.float32(0)), np.nextafter(amax, np.float32(np.inf))]
    )
    blocks = rng.uniform(-1, 1, (len(amax), 32)).astype(np.float32) * amax[:, None]
    blocks[:, 7] = -amax
    spec = QuantSpec(format=fmt, block=(1, 32), scale_format=ExponentFormat(rule))
    scale = affine.find_scales(jnp.asarray(blocks), spec).scale
    expected = np.array([mx_exponent(m, fmt, rule) for m in amax])
    np.testing.assert_array_equal(np.asarray(scale.qvalue)[:, 0], expected + 127)
    q = affine.quantize_array(
        jnp.asarray(blocks), affine.find_scales(jnp.asarray(blocks), spec), spec=spec
    )
    v = np.clip(blocks / 2.0 ** expected[:, None], -fmt.max_level, fmt.max_level)
    element = v.astype(np.float32).astype(FLOATS[name][1])  # exact: a power of two
    np.testing.assert_array_equal(affine.codes_of(q), element.view(np.uint8))
    values = element.astype(np.float32) * np.float32(2.0) ** expected[:, None].astype(np.float32)
    np.testing.assert_array_equal(affine.dequantize_array(q), values.astype(np.float32))
    if rule is ScaleRule.CEIL:
        assert np.abs(blocks / 2.0 ** expected[:, None]).max() <= fmt.max_level


def test_mx_zero_and_nan_blocks():
    x = jnp.stack([jnp.zeros(32), jnp.full(32, jnp.nan), jnp.ones(32).at[3].set(jnp.inf)])
    for rule in ScaleRule:
        spec = QuantSpec(format=formats.e2m1, block=(1, 32), scale_format=ExponentFormat(rule))
        scales = affine.find_scales(x, spec)
        assert scales.scale.qvalue[:, 0].tolist() == [127, 255, 255]  # scale 1, NaN, NaN
        y = np.asarray(affine.fake_quantize_array(x, scales, spec=spec))
        assert np.all(y[0] == 0) and np.isnan(y[1:]).all()


def test_e8m0_codes_are_exponents():
    codes = np.arange(1, 255, dtype=np.uint8)
    scale = formats.e8m0.decode(jnp.asarray(codes))
    np.testing.assert_array_equal(scale, np.ldexp(np.float32(1), codes.astype(int) - 127))
    np.testing.assert_array_equal(formats.e8m0.encode(scale), codes)
    reference = codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(scale, reference)


def test_nvfp4_against_its_definition():
    """s_b = e4m3(amax_b / 6 / g), g = amax / (448 * 6); codes are e2m1(x / (s_b g))."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(24, 64)) * np.exp(rng.normal(size=(24, 64)))).astype(np.float32)
    x[3, :16] = 0  # a block of zeros
    x[4, :16] *= 1e-7  # a block too small for its scale to be kept
    spec = QuantSpec(format=formats.e2m1, block=(1, 16), scale_format=formats.e4m3)
    scales = affine.find_scales(jnp.asarray(x), spec)
    blocks = x.reshape(24, 4, 16).astype(np.float64)
    amax = np.abs(blocks).max(-1)
    g = amax.max() / (448 * 6)
    # 3e-7: two float32 roundings (of the constants and of the products) of 2^-24 each, and slack.
    np.testing.assert_allclose(np.asarray(scales.scale.scale).item(), g, rtol=3e-7)
    ratio = amax / 6 / g
    expected = ratio.astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(scales.scale.qvalue, expected.view(np.uint8))
    assert expected[3, 0] == 0 and expected[4, 0] == 0
    step = expected.astype(np.float64) * g
    y = np.asarray(affine.fake_quantize_array(jnp.asarray(x), scales, spec=spec))
    v = np.divide(blocks, step[..., None], out=np.zeros_like(blocks), where=step[..., None] > 0)
    wanted = (
        v.astype(np.float32).astype(ml_dtypes.float4_e2m1fn).astype(np.float64) * step[..., None]
    )
    # 4e-7: as above, one more rounding; a tie within that of a boundary would show as a step.
    np.testing.assert_allclose(y.reshape(blocks.shape), wanted, rtol=4e-7, atol=0)
