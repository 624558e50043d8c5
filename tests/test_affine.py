"""Laws of rounding one array at given scales, and the gradients that pass through it."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import quantjax as qj
from quantjax import affine, formats
from quantjax.affine import Scales
from quantjax.formats import Codebook, IntFormat, Levels
from quantjax.levels import fake_quantize_levels
from quantjax.rounding import noise
from quantjax.spec import QuantSpec
from tests.daily import daily, dealt

SHAPE = (10, 6)
SYMMETRIC = {
    "int8": IntFormat(8),
    "int4": IntFormat(4),
    "int4 full": IntFormat(4, levels=Levels.FULL),
    "int4 half": IntFormat(4, levels=Levels.HALF),
    "binary": formats.binary,
    "ternary": formats.ternary,
    "e4m3": formats.e4m3,
    "e2m1": formats.e2m1,
    "nf4": formats.nf4,
}


def by_format(core):
    """Each question is asked a few formats a day; between them the questions meet all."""
    return pytest.mark.parametrize("fmt", daily(SYMMETRIC, core), indirect=True)


@pytest.fixture
def fmt(request):
    return SYMMETRIC.get(request.param, request.param)


def normal(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def fake(x, scales, spec):
    return affine.fake_quantize_array(x, scales, spec=spec)


def unit() -> Scales:
    """A scale of one per column."""
    return Scales(jnp.ones((1, SHAPE[1]), jnp.float32))


# Laws.


@settings(max_examples=6)
@given(
    bits=st.integers(2, 8),
    levels=st.sampled_from(Levels),
    seed=st.integers(0, 2**16),
    magnitude=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
)
def test_inside_the_range_the_error_is_at_most_half_a_step(bits, levels, seed, magnitude):
    spec = QuantSpec(format=IntFormat(bits, levels=levels), block=(None, 1))
    x = normal(seed) * magnitude
    scales = affine.find_scales(x, spec)
    error = jnp.abs(fake(x, scales, spec) - x) / scales.scale
    # x / s and level * s are each rounded once: 2^-24 of a level of at most 2^7, twice.
    slack = 2 * 2.0**-24 * 2 ** (bits - 1)
    # The side with the extra level is all inside; so are the others, up to the last level.
    assert float(error.max()) <= 0.5 + slack


@settings(max_examples=6)
@given(bits=st.integers(2, 8), signed=st.booleans(), seed=st.integers(0, 2**16))
def test_asymmetric_error_is_at_most_half_a_step_and_zero_is_exact(bits, signed, seed):
    fmt = IntFormat(bits, signed, Levels.FULL)
    spec = QuantSpec(format=fmt, block=(None, 1), symmetric=False, observer=qj.minmax())
    shift = np.random.default_rng(seed).normal(size=SHAPE[1]) * 3  # ranges beside zero too
    x = (normal(seed) + jnp.asarray(shift, jnp.float32)).at[0].set(0.0)
    scales = affine.find_scales(x, spec)
    y = fake(x, scales, spec)
    # A step is 2^-24 * levels wide of rounding, in x * S, in the zero point and in the result.
    slack = 4 * 2.0**-24 * 2**bits
    assert float((jnp.abs(y - x) / scales.scale).max()) <= 0.5 + slack
    assert not y[0].any()


@pytest.mark.parametrize("fmt, rounding", dealt(SYMMETRIC, qj.Rounding), indirect=["fmt"])
def test_values_on_the_grid_stay(fmt, rounding, key):
    spec = QuantSpec(format=fmt, block=(None, 1), rounding=rounding)
    rng = np.random.default_rng(0)
    scales = Scales(jnp.asarray(2.0 ** rng.integers(-9, 9, (1, SHAPE[1])), jnp.float32))
    x = jnp.asarray(rng.choice(fmt.grid, SHAPE)) * scales.scale
    y = affine.fake_quantize_array(x, scales, noise(rounding, key, SHAPE), spec=spec)
    if rounding is qj.Rounding.STOCHASTIC and not isinstance(fmt, IntFormat | formats.FloatFormat):
        # A codebook's level, found by search, may be missed by one bit: then u = 0 moves it.
        np.testing.assert_allclose(y, x, rtol=2.0**-23)
    else:
        np.testing.assert_array_equal(y, x)
    codes = affine.quantize_array(x, scales, spec=spec)
    again = affine.quantize_array(affine.dequantize_array(codes), scales, spec=spec)
    np.testing.assert_array_equal(codes.qvalue, again.qvalue)


@by_format(["int4", "ternary", "e4m3"])
def test_permuting_channels_permutes_codes(fmt):
    spec = QuantSpec(format=fmt, block=(None, 1))
    x, order = normal(), np.random.default_rng(1).permutation(SHAPE[1])
    q = affine.quantize_array(x, affine.find_scales(x, spec), spec=spec)
    p = affine.quantize_array(x[:, order], affine.find_scales(x[:, order], spec), spec=spec)
    np.testing.assert_array_equal(affine.codes_of(p), affine.codes_of(q)[:, order])
    np.testing.assert_array_equal(p.scale, q.scale[:, order])


@by_format(["int8", "int4 full", "binary", "e2m1", "nf4"])
def test_zero_maps_to_zero_where_the_grid_has_it(fmt):
    spec = QuantSpec(format=fmt, block=(None, 1))
    x = normal().at[3].set(0.0).at[4].set(-0.0)
    y = fake(x, affine.find_scales(x, spec), spec)
    if fmt.has_zero:
        assert not y[3:5].any()
    else:  # the nearest there is, on the positive side
        np.testing.assert_array_equal(y[3], affine.find_scales(x, spec).scale[0] / 2)


@by_format(["int4 half", "e2m1", "nf4"])
def test_scaling_by_a_power_of_two_scales_the_result(fmt):
    spec = QuantSpec(format=fmt, block=(None, 1))
    x = normal()
    y = fake(x, affine.find_scales(x, spec), spec)
    z = fake(x * 1024, affine.find_scales(x * 1024, spec), spec)
    np.testing.assert_array_equal(z, y * 1024)


def test_codes_are_stored_as_documented():
    x = normal()
    for fmt, dtype, low in [
        (IntFormat(8), jnp.int8, -127),
        (IntFormat(8, signed=False), jnp.uint8, 0),
        (IntFormat(3), jnp.uint8, -3),
        (formats.e4m3, jnp.uint8, 0),
        (formats.nf4, jnp.uint8, 0),
    ]:
        spec = QuantSpec(format=fmt, block=(None, 1))
        q = affine.quantize_array(x, affine.find_scales(x, spec), spec=spec)
        assert q.qvalue.dtype == dtype and q.shape == SHAPE
        codes = affine.codes_of(q)
        assert codes.shape == SHAPE and int(codes.min()) >= low
        assert (q.packed is None) == (fmt.bits == 8)


def test_grad_refuses_codes():
    spec = QuantSpec(format=IntFormat(8), block=(None, 1))
    q = affine.quantize_array(normal(), affine.find_scales(normal(), spec), spec=spec)
    with pytest.raises(TypeError, match="grad requires real"):
        jax.grad(lambda q: affine.dequantize_array(q).sum())(q)


# Stochastic rounding.


@by_format(["int4 half", "ternary", "e4m3", "nf4"])
def test_stochastic_rounding_is_unbiased(fmt):
    spec = QuantSpec(format=fmt, block=(None, 1), rounding=qj.Rounding.STOCHASTIC)
    top = min(fmt.max_level, -fmt.lowest)
    x = jnp.clip(normal() * top / 2, -top, top)
    n = 4000

    def one(key):
        return affine.fake_quantize_array(x, unit(), noise(spec.rounding, key, SHAPE), spec=spec)

    draws = np.asarray(jax.vmap(one)(jax.random.split(jax.random.key(0), n)), np.float64)
    nearest = np.asarray(fake(x, unit(), QuantSpec(format=fmt, block=(None, 1))))
    # Each draw is one of two neighbours, so its variance is p (1 - p) gap^2; 4 sigma of the mean,
    # and one part in 2^23 for the noise, which has 23 bits.
    gap = draws.max(0) - draws.min(0)
    p = np.abs(np.asarray(x) - draws.min(0)) / np.where(gap > 0, gap, 1)
    sigma = gap * np.sqrt(np.clip(p * (1 - p), 0, None) / n)
    assert np.all(np.abs(draws.mean(0) - x) <= 4 * sigma + 2.0**-22 * np.abs(x) + 1e-3 * gap)
    # Both neighbours, and no others, are drawn.
    assert max(len(np.unique(draws[:, i, j])) for i in range(10) for j in range(6)) == 2
    assert np.all((nearest >= draws.min(0)) & (nearest <= draws.max(0)) | (gap == 0))


def test_stochastic_needs_a_key():
    spec = QuantSpec(format=IntFormat(8), rounding=qj.Rounding.STOCHASTIC)
    with pytest.raises(ValueError, match="needs a key"):
        qj.quantize({"w": normal()}, qj.Policy([("w", spec)]))


# Gradients: the written rule, 1 inside the cells and 0 outside, at scale 1.

# Format, zero point, values that pass, values that are cut.
INSIDE = [
    (IntFormat(4), None, [-7.49, -7.0, 0.0, 0.3, 7.49], [-7.6, -8.0, 7.51, 100.0]),
    (IntFormat(4, levels=Levels.FULL), None, [-8.49, 0.0, 7.49], [-8.51, 7.51, -1e9]),
    (IntFormat(4, levels=Levels.HALF), None, [-8.0, -7.9, 0.0, 7.99], [-8.01, 8.01, 1e9]),
    (formats.binary, None, [-1.0, -0.1, 0.0, 0.99], [-1.01, 1.01]),
    (formats.ternary, None, [-1.49, 0.0, 1.49], [-1.51, 1.51]),
    (IntFormat(4, signed=False), None, [-0.49, 0.0, 15.49], [-0.51, 15.51]),
    (IntFormat(4, signed=False), 5, [-5.49, 0.0, 10.49], [-5.51, 10.51]),
    (IntFormat(8), -100, [-27.49, 0.0, 227.49], [-27.51, 227.51]),
    (formats.e2m1, None, [-6.99, 0.0, 0.1, 6.99], [-7.01, 7.01, 1e9]),
    (formats.e4m3, None, [-463.0, 0.0, 463.0], [-465.0, 465.0]),
    (formats.nf4, None, [-1.15, 0.0, 1.13], [-1.153, 1.14]),
    (Codebook((-3.0, -1.0, 0.0, 0.5)), None, [-3.99, 0.0, 0.74], [-4.01, 0.76]),
]


@pytest.mark.parametrize(
    "case", daily(INSIDE, [INSIDE[i] for i in (2, 6, 8, 10)]), ids=[str(r[0]) for r in INSIDE]
)
def test_straight_through_gradient(case):
    fmt, zero, inside, outside = case
    x = jnp.asarray(inside + outside, jnp.float32)
    spec = QuantSpec(format=fmt, block=(None,), symmetric=zero is None)
    zero_point = None if zero is None else jnp.array([zero], fmt.code_dtype)
    scales = Scales(jnp.ones(1), zero_point)
    weight = jnp.arange(1.0, 1 + len(x))  # dL/dy

    def loss(x, scale):
        return (fake(x, scales._replace(scale=scale), spec) * weight).sum()

    to_x, to_scale = jax.grad(loss, (0, 1))(x, scales.scale)
    passes = np.array([1.0] * len(inside) + [0.0] * len(outside), np.float32)
    np.testing.assert_array_equal(to_x, weight * passes)  # exactly
    np.testing.assert_array_equal(to_scale, [0.0])
    jitted = jax.jit(jax.grad(loss, (0, 1)))(x, scales.scale)
    np.testing.assert_array_equal(jitted[0], to_x)
    half = x.astype(jnp.bfloat16)
    assert jax.eval_shape(jax.grad(loss), half, scales.scale).dtype == jnp.bfloat16


def test_learned_codebooks_clip_nothing_they_were_learned_from_and_get_no_gradient():
    spec = QuantSpec(format=Codebook.learned(2), block=(None, 1))
    x = normal()
    scales = affine.find_scales(x, spec)

    def loss(x, codebook):
        return fake(x, scales._replace(codebook=codebook), spec).sum()

    to_x, to_levels = jax.grad(loss, (0, 1))(x, scales.codebook)
    np.testing.assert_array_equal(to_x, jnp.ones(SHAPE))
    assert not to_levels.any()


def test_absmax_gradient_is_one_everywhere():
    """Nothing is clipped, and none flows through the maximum."""
    for name in ("w8", "nf4g4"):
        to_x = jax.grad(lambda p: qj.fake_quantize(p, name)["w"].sum())({"w": normal()})  # noqa: B023
        np.testing.assert_array_equal(to_x["w"], jnp.ones(SHAPE))


@pytest.mark.parametrize(
    "name",
    daily(["w8", "w4", "w2", "binary", "mxfp4", "nvfp4", "nf4g4"], ["w2", "nvfp4", "nf4g4"]),
)
def test_gradients_of_zero_blocks_are_finite(name):
    """The derivative of a search in an all-zero block is 0 / 0, unless it is cut."""
    params = {"w": normal().at[:, 2].set(0.0)}
    to_x = jax.grad(lambda p: qj.fake_quantize(p, name)["w"].sum())(params)["w"]
    assert bool(jnp.isin(to_x, jnp.array([0.0, 1.0])).all())


def test_no_search_is_differentiated():
    """The loop of the search stands once in the gradient's program: nothing of it is transposed."""

    def count(f):
        return str(jax.make_jaxpr(f)({"w": normal()})).count("scan[")

    forward = count(lambda p: qj.fake_quantize(p, "w4"))
    assert count(jax.grad(lambda p: qj.fake_quantize(p, "w4")["w"].sum())) == forward


# Traced bounds.


@pytest.mark.parametrize("levels", Levels)
def test_traced_levels_equal_the_format(levels):
    for bits in (2, 4, 8):
        fmt = IntFormat(bits, levels=levels)
        spec = QuantSpec(format=fmt, block=(None, 1))
        x = normal(bits) * 2
        scales = affine.find_scales(x, spec)
        x = x * 2.5  # so that some are clipped
        bounds = (jnp.float32(fmt.lowest), jnp.float32(fmt.grid[-1]))

        def formatted(x):
            return fake(x, scales, spec)  # noqa: B023

        def traced(x):
            return fake_quantize_levels(x, scales.scale, *bounds)  # noqa: B023

        for f in (lambda f: f, jax.jit):
            expected, got = np.asarray(f(formatted)(x)), np.asarray(f(traced)(x))
            np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))
        gradient = jax.grad(lambda x: formatted(x).sum())(x)  # noqa: B023
        np.testing.assert_array_equal(jax.grad(lambda x: traced(x).sum())(x), gradient)  # noqa: B023
        assert 0 < float(gradient.mean()) < 1


def test_traced_levels_vmap_over_bit_widths():
    x = normal()
    bits = jnp.arange(2, 9)
    top = 2.0 ** (bits - 1) - 1
    scale = jnp.abs(x).max() / top
    got = jax.vmap(lambda s, t: fake_quantize_levels(x, s, -t, t))(scale, top)
    for i, b in enumerate(bits):
        spec = QuantSpec(format=IntFormat(int(b)), block=(None, None))
        expected = fake(x, Scales(scale[i].reshape(1, 1)), spec)
        np.testing.assert_array_equal(got[i], expected)


def test_traced_levels_give_scale_and_bounds_no_gradient():
    grads = jax.grad(lambda *a: fake_quantize_levels(*a).sum(), (0, 1, 2, 3))(
        jnp.array([0.2, -9.0]), jnp.float32(1), jnp.float32(-7), jnp.float32(7)
    )
    assert grads[0].tolist() == [1.0, 0.0] and not any(map(float, grads[1:]))


def test_the_gradient_of_a_learned_codebook_is_cut_beyond_its_levels():
    w = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(64, 8)), jnp.float32)}
    like = qj.quantize(w, qj.Policy(otherwise=qj.QuantSpec(format=qj.Codebook.learned(3))))
    loss = lambda w: qj.fake_quantize(w, like=like)["kernel"].sum()  # noqa: E731
    gradient = jax.grad(loss)({"kernel": 3 * w["kernel"]})["kernel"]
    q = like["kernel"]
    outer = jnp.abs(3 * w["kernel"]) > 1.5 * q.scale
    assert bool(outer.any()) and bool((gradient[outer] == 0).all())
    np.testing.assert_array_equal(jax.grad(loss)(w)["kernel"], 1)


@pytest.mark.parametrize("bits", range(1, 8))
def test_every_stored_byte_is_its_code_again(bits):
    stored = jnp.arange(2**bits, dtype=jnp.uint8)
    codes = affine._loaded(stored, IntFormat(bits, levels=Levels.HALF))
    assert codes.dtype == jnp.int8
    assert codes.tolist() == list(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))


@pytest.mark.parametrize("name", ["w2", "w4"])
def test_two_leaves_decoded_in_one_sum_are_those_decoded_alone(name):
    # XLA on CPU gives garbage here where both are decoded by adding the same int8 constant.
    a, b = (
        qj.quantize({"kernel": jax.random.normal(jax.random.key(i), (64, 64))}, name)["kernel"]
        for i in range(2)
    )

    def both(a, b):
        a, b = (affine.codes_of(q).astype(jnp.float32) for q in (a, b))
        return (a * 0.5 + b).sum(1)

    with jax.disable_jit():
        expected = both(a, b)  # small integers over two, exact in any order
    np.testing.assert_array_equal(jax.jit(both)(a, b), expected)
