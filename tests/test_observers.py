"""Do observers find the range they promise, block by block and batch by batch?"""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import quantjax as qj
from quantjax import affine, formats
from quantjax.blocks import counts, split
from quantjax.formats import IntFormat, Levels
from quantjax.observers import ROW, Grid, observe
from quantjax.scales import HUGE, TINY, scale_of_range
from quantjax.spec import QuantSpec
from tests.daily import daily, dealt

INT8 = Grid(IntFormat(8), symmetric=True)
ASYMMETRIC = Grid(IntFormat(8), symmetric=False)
OBSERVERS = {
    "absmax": qj.absmax(),
    "minmax": qj.minmax(),
    "ema": qj.ema(0.9),
    "percentile": qj.percentile(95.0),
    "mse": qj.mse(steps=20),
    "mse p": qj.mse(2.4, steps=20),
}


def normal(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("observer", "block", "grid"))
def observed(x, weights, observer, block, grid):
    w = None if weights is None else split(weights, block).values
    return observe(observer, split(x, block), grid, w)


def ranges(observer, x, block, grid=INT8, weights=None):
    low, high = observed(x, weights, observer, block, grid)
    return np.asarray(low), np.asarray(high)


find = jax.jit(affine.find_scales, static_argnames="spec")


@functools.partial(jax.jit, static_argnames="spec")
def quantized(x, spec):
    """The nearest values that the spec can hold."""
    return affine.fake_quantize_array(x, affine.find_scales(x, spec), spec=spec)


def blocks_of(x: np.ndarray, block: tuple[int, int]):
    """Every block of a matrix by slicing, the short last ones too: (index, values)."""
    rows, columns = (n if b is None else b for n, b in zip(x.shape, block, strict=True))
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], columns):
            yield (i // rows, j // columns), x[i : i + rows, j : j + columns]


@pytest.mark.parametrize(
    "block", daily([(None, 1), (None, None), (4, 1), (5, 3), (1, 1)], [(None, None), (5, 3)])
)
def test_ranges_are_those_of_each_block(block):
    x = normal((10, 7)) + 0.5
    got = {name: ranges(OBSERVERS[name], x, block, ASYMMETRIC) for name in ("absmax", "minmax")}
    q = ranges(qj.percentile(90.0), x, block, INT8)
    q_asymmetric = ranges(qj.percentile(90.0), x, block, ASYMMETRIC)
    assert got["absmax"][0].shape == counts(x.shape, block)
    for at, values in blocks_of(x, block):
        largest = np.abs(values).max()
        assert (got["absmax"][0][at], got["absmax"][1][at]) == (-largest, largest)
        assert (got["minmax"][0][at], got["minmax"][1][at]) == (values.min(), values.max())
        # Interpolation between two elements in float32, of magnitude below 4.
        close = dict(rtol=0, atol=4 * 2.0**-22)
        high = np.quantile(np.abs(values).astype(np.float64), 0.9)
        np.testing.assert_allclose([q[0][at], q[1][at]], [-high, high], **close)
        low_high = np.quantile(values.astype(np.float64), [0.1, 0.9])
        np.testing.assert_allclose([q_asymmetric[0][at], q_asymmetric[1][at]], low_high, **close)


@pytest.mark.parametrize("name, symmetric", dealt(OBSERVERS, [True, False]))
def test_the_padding_of_a_short_block_does_not_count(name, symmetric):
    """A short last block has the range that it has on its own, whatever stands at its edge."""
    x = normal((10, 7))
    x[-1], x[:, -1] = 9.0, -7.0  # the edge that padding would repeat
    grid = Grid(IntFormat(4), symmetric)
    low, high = ranges(OBSERVERS[name], x, (4, 3), grid)
    for at, values in blocks_of(x, (4, 3)):
        own = ranges(OBSERVERS[name], values, (None, None), grid)
        # 1e-5: sums in another order; a search then ends in the same place but for rounding.
        np.testing.assert_allclose([low[at], high[at]], [own[0][0, 0], own[1][0, 0]], rtol=1e-5)


def test_weights_of_a_short_block_do_not_leak():
    x, w = normal((10, 2)), np.ones((10, 2), np.float32)
    w[-1] = 1e4  # the edge that padding would repeat
    got = ranges(qj.mse(), x, (4, 1), weights=w)[1]
    own = ranges(qj.mse(), x[8:], (None, 1), weights=w[8:])[1]
    np.testing.assert_allclose(got[2], own[0], rtol=1e-5)


# Batches.


def fold(observer, batches, grid, block=(None, None)):
    state = observer.init(grid)
    for x in batches:
        state = observer.update(state, split(jnp.asarray(x), block), grid)
    return [float(v.reshape(())) for v in observer.finalize(state)]


def test_observers_over_batches():
    batches = [normal((6, 5), seed) * (seed + 1) for seed in range(4)]
    everything = np.concatenate(batches)
    largest = np.abs(everything).max()
    assert fold(qj.absmax(), batches, INT8) == [-largest, largest]
    assert fold(qj.minmax(), batches, ASYMMETRIC) == [everything.min(), everything.max()]

    low, high = batches[0].min(), batches[0].max()  # the moving average by hand
    for x in batches[1:]:
        low, high = 0.9 * low + 0.1 * x.min(), 0.9 * high + 0.1 * x.max()
    # 1e-6: four averages in float32.
    np.testing.assert_allclose(fold(qj.ema(0.9), batches, ASYMMETRIC), [low, high], rtol=1e-6)

    mean = np.mean([np.quantile(np.abs(x), 0.95) for x in batches])
    np.testing.assert_allclose(fold(qj.percentile(95.0), batches, INT8), [-mean, mean], rtol=1e-6)


def test_mse_over_batches_minimises_the_sum_of_their_errors():
    grid = Grid(IntFormat(4), symmetric=True)
    batches = [normal((64, 4), seed) for seed in range(3)]
    observer = qj.mse(steps=40, lowest=0.1)
    high = fold(observer, batches, grid)[1]
    x = np.concatenate(batches)
    widest = np.abs(batches[0]).max()
    errors = [
        squared_error(x, np.float32(widest * f) / 7, grid.format)
        for f in np.geomspace(1, 0.1, 40).astype(np.float32)
    ]
    got = squared_error(x, high / 7, grid.format)
    assert got <= min(errors) * (1 + 1e-5)  # 1e-5: float32 sums of 768 terms


@pytest.mark.parametrize("rows, block", [(10, (4, 1)), (ROW // 2 + 1, (None, 1))])
def test_mse_over_batches_knows_what_every_range_loses_in_every_block(rows, block):
    """Also where blocks are short, elements weighted, and the last row of values is not full."""
    observer, grid = qj.mse(steps=5, lowest=0.1), Grid(IntFormat(3), symmetric=True)
    x, w = normal((rows, 3)), np.abs(normal((rows, 3), seed=1))
    weights = split(jnp.asarray(w), block).values
    _, high, errors = observer.update(None, split(jnp.asarray(x), block), grid, weights)
    assert errors.shape == (5, *counts(x.shape, block))
    for (at, values), (_, own) in zip(blocks_of(x, block), blocks_of(w, block), strict=True):
        scales = np.asarray(high[at]) * np.geomspace(1, 0.1, 5).astype(np.float32) / 3
        codes = np.clip(np.round(values[..., None] / scales), grid.format.qmin, 3)
        unit = 2.0 ** np.floor(np.log2(high[at]))  # of these, errors are counted
        off = (values[..., None] - codes * scales) / unit
        expected = (own[..., None] * off**2).sum((0, 1))
        np.testing.assert_allclose(errors[(slice(None), *at)], expected, rtol=1e-4)


@pytest.mark.parametrize("name", daily(OBSERVERS, ["ema", "percentile"]))
def test_state_can_be_jitted_and_folded(name):
    """The state is a pytree, and one batch equals a single observation."""
    observer, x = OBSERVERS[name], split(jnp.asarray(normal((6, 5))), (None, 1))

    @jax.jit
    def update(state, values):
        return observer.update(state, x._replace(values=values), INT8)

    state = update(update(observer.init(INT8), x.values), x.values)
    low, high = observer.finalize(state)
    once = observer.finalize(observer.update(observer.init(INT8), x, INT8))
    # The same batch twice is the same range; averages round once.
    np.testing.assert_allclose(high, once[1], rtol=2e-7)
    assert low.shape == (1, 5)


# The squared-error search.


def squared_error(x, scale, fmt: IntFormat, weights=1.0) -> float:
    x = x.astype(np.float64)
    offset = 0.5 if fmt.levels is Levels.HALF else 0.0
    codes = np.clip(np.round(x / scale - offset), fmt.qmin, fmt.qmax)
    return float((weights * (x - (codes + offset) * scale) ** 2).sum())


FORMATS = [IntFormat(b, levels=v) for b in (2, 4) for v in Levels]


@pytest.mark.parametrize("fmt", daily(FORMATS, FORMATS[::2]), ids=str)
def test_mse_finds_the_best_step_of_a_fine_brute_force(fmt):
    x = normal((400, 3), 7)
    w = np.exp(normal((400, 3), 8))
    for weights in (None, w):
        spec = QuantSpec(format=fmt, block=(None, 1), observer=qj.mse())
        scales = find(x, spec, weights)
        for column in range(3):
            values, weight = x[:, column], 1.0 if weights is None else w[:, column]
            widest = np.abs(values).max() / fmt.max_level
            best = min(
                squared_error(values, widest * f, fmt, weight) for f in np.linspace(0.05, 1, 2000)
            )
            got = squared_error(values, float(scales.scale[0, column]), fmt, weight)
            # The error is a rough function of the step; the search of 100 ends within 2 %.
            assert got <= 1.02 * best


# Mean squared error of N(0, 1) at the best step of 2^b uniform levels, computed independently
# from the integral over the normal density. Bits: half, full, narrow.
UNIFORM = {
    2: (0.1188, 0.1494, 0.1902),
    3: (0.0374, 0.0406, 0.0469),
    4: (0.01154, 0.01186, 0.01289),
    5: (0.00350, 0.00353, 0.00369),
    6: (0.00104, 0.001043, 0.001069),
}


@pytest.mark.parametrize("bits", daily(UNIFORM, [3]))
def test_mse_reaches_the_optimum_of_the_normal_distribution(bits):
    from statistics import NormalDist

    n = 50_000  # quantiles at (i + 1/2) / n: a sample without noise
    half = np.array([NormalDist().inv_cdf((i + 0.5) / n) for i in range(n // 2)])
    x = jnp.asarray(np.concatenate([half, -half]), jnp.float32)
    order = (Levels.HALF, Levels.FULL, Levels.NARROW)
    for levels, expected in zip(order, UNIFORM[bits], strict=True):
        spec = QuantSpec(format=IntFormat(bits, levels=levels), block=(None,), observer=qj.mse())
        y = quantized(x, spec)
        error = float(jnp.mean((x - y) ** 2))
        # 1 %, which holds half a unit of the last printed digit.
        assert abs(error / expected - 1) < 0.01, levels


MSE_SPECS = [
    dict(format=IntFormat(4)),
    dict(format=IntFormat(2, levels=Levels.HALF)),
    dict(format=IntFormat(4, signed=False), symmetric=False),
    dict(format=formats.e2m1),
    dict(format=formats.nf4),
    dict(format=formats.e2m1, scale_format=formats.ExponentFormat()),
]


@pytest.mark.parametrize(
    "fields", daily(MSE_SPECS, MSE_SPECS[1::2]), ids=lambda f: str(f["format"])
)
@settings(max_examples=6)
@given(seed=st.integers(0, 2**16), power=st.sampled_from([1.0, 3.0]))
def test_mse_is_never_worse_than_absmax(fields, seed, power):
    x = normal((24, 4), seed)
    x = jnp.asarray(np.sign(x) * np.abs(x) ** power)  # power 3: heavy tails

    def errors(observer):
        spec = QuantSpec(block=(9, 1), observer=observer, **fields)
        y = quantized(x, spec)
        error = split((x - y) ** 2, (9, 1))
        return jnp.where(error.valid, error.values, 0).sum(error.axes)

    widest = qj.absmax() if fields.get("symmetric", True) else qj.minmax()
    searched, plain = errors(qj.mse()), errors(widest)
    # Errors are sums in float32, compared with their own rounding (1e-5) and that of x.
    assert bool((searched <= plain * (1 + 1e-5) + 1e-12 * jnp.max(x * x)).all())


def test_weights_matter_in_the_search():
    x = np.concatenate([normal((200, 1)), np.full((1, 1), 30.0, np.float32)])
    spec = QuantSpec(format=IntFormat(4), block=(None, 1), observer=qj.mse())
    # Two arrays: JAX may read the memory of NumPy's after the call has returned.
    alone, without = np.ones_like(x), np.ones_like(x)
    alone[-1], without[-1] = 1e6, 0.0  # the outlier is all that counts, or does not count
    heavy, light = find(x, spec, alone), find(x, spec, without)
    y = affine.fake_quantize_array(jnp.asarray(x), heavy, spec=spec)
    assert abs(float(y[-1, 0]) - 30) < 1e-2
    assert float(light.scale[0, 0]) < 0.2 * float(heavy.scale[0, 0])


def test_percentile_beats_absmax_with_one_outlier():
    for seed in range(5):
        x = normal((1000, 1), seed)
        x[17] = 100.0

        def error(observer, x=x):
            spec = QuantSpec(format=IntFormat(4), block=(None, 1), observer=observer)
            return float(jnp.median((x - quantized(x, spec)) ** 2))

        # The median of squared errors, since the clipped outlier is what is given up.
        assert error(qj.percentile(99.5)) < 0.1 * error(qj.absmax())


# From range to scale.


def test_scales_of_ranges():
    low, high = jnp.array([-1.0, -3.0, 0.5, 0.0]), jnp.array([2.0, 1.0, 2.0, 0.0])
    scale, zero = scale_of_range(low, high, IntFormat(8))
    # One product with a rounded constant: 2^-23 of the exact quotient.
    np.testing.assert_allclose(scale, [2 / 127, 3 / 127, 2 / 127, 1], rtol=2.0**-23)
    assert zero is None
    scale, zero = scale_of_range(low, high, IntFormat(8, signed=False), symmetric=False)
    np.testing.assert_allclose(scale, [3 / 255, 4 / 255, 2 / 255, 1], rtol=2.0**-23)
    assert zero.tolist() == [85, 191, 0, 0]
    scale, zero = scale_of_range(low, high, IntFormat(4, signed=False))
    np.testing.assert_allclose(scale, [2 / 15, 1 / 15, 2 / 15, 1], rtol=2.0**-23)


def test_scales_and_their_inverses_stay_finite():
    for amax in (1e-45, 1e-38, 2e-38, 1e38, 3.4e38):
        for fmt in (IntFormat(8), formats.ternary, formats.binary, formats.e5m2):
            scale, _ = scale_of_range(jnp.float32(-amax), jnp.float32(amax), fmt)
            assert TINY <= float(scale) <= HUGE and np.isfinite(1 / float(scale))


@pytest.mark.parametrize(
    "make",
    [
        lambda: qj.ema(1.0),
        lambda: qj.ema(-0.1),
        lambda: qj.percentile(50.0),
        lambda: qj.percentile(101.0),
        lambda: qj.mse(0.0),
        lambda: qj.mse(steps=1),
        lambda: qj.mse(lowest=1.0),
    ],
)
def test_settings_without_meaning_raise(make):
    with pytest.raises(ValueError, match="got"):
        make()


def test_observers_are_values():
    assert qj.percentile(99.9) == qj.percentile(99.9) != qj.percentile(99.0)
    assert len({qj.absmax(), qj.absmax(), qj.mse(), qj.mse(), qj.ema(), qj.minmax()}) == 4
    assert all(isinstance(o, qj.Observer) for o in OBSERVERS.values())
