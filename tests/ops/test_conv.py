"""Is the convolution of codes exact: every kind, every platform's form, in blocks, mapped?"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from quantjax.ops import conv, force, integer_conv, prefers_integers
from quantjax.ops.patches import Window, convolve
from tests.daily import daily, dealt

NWC, NHWC, NDHWC = (
    ("NWC", "WIO", "NWC"),
    ("NHWC", "HWIO", "NHWC"),
    ("NDHWC", "DHWIO", "NDHWC"),
)


def case(x, w, layout, *, strides=None, padding="VALID", dilation=None, holes=None, **groups):
    """Shapes of x and w, and the arguments of `lax.conv_general_dilated`."""
    ones = (1,) * (len(x) - 2)
    kwargs = {"window_strides": strides or ones, "padding": padding, "dimension_numbers": layout}
    return (
        x,
        w,
        {**kwargs, "lhs_dilation": holes or ones, "rhs_dilation": dilation or ones} | groups,
    )


CASES = {
    "1-D": case((2, 9, 3), (3, 3, 4), NWC, padding="SAME"),
    "1-D, channels first": case((2, 3, 9), (4, 3, 3), ("NCW", "OIW", "NCW"), strides=(2,)),
    "2-D": case((3, 6, 7, 5), (3, 3, 5, 4), NHWC, padding="SAME"),
    "channels first": case((2, 5, 6, 7), (4, 5, 3, 2), None, padding="SAME"),
    "mixed layout": case((6, 7, 2, 5), (3, 4, 5, 2), ("HWNC", "HOIW", "CNHW"), padding="SAME"),
    "rows apart": case((2, 6, 5, 64), (3, 3, 64, 4), NHWC, padding="SAME"),
    "strided": case((2, 9, 8, 64), (3, 2, 64, 4), NHWC, strides=(2, 3), padding="SAME"),
    "dilated": case((2, 9, 9, 48), (3, 3, 48, 4), NHWC, dilation=(2, 3), padding="SAME"),
    "1x1": case((2, 5, 5, 7), (1, 1, 7, 6), NHWC),
    "1x1, strided": case((2, 5, 5, 7), (1, 1, 7, 6), NHWC, strides=(2, 2)),
    "tiles": case((2, 9, 13, 3), (4, 3, 3, 5), NHWC, strides=(4, 3)),
    "explicit padding": case((2, 6, 7, 3), (3, 3, 3, 4), NHWC, padding=((2, 0), (1, 3))),
    "negative padding": case((2, 8, 7, 3), (3, 3, 3, 4), NHWC, padding=((-1, 2), (3, -2))),
    "no place": case((2, 2, 7, 3), (3, 3, 3, 4), NHWC),
    "groups": case((2, 6, 5, 6), (3, 3, 2, 9), NHWC, padding="SAME", feature_group_count=3),
    "depthwise": case(
        (2, 6, 5, 6), (3, 3, 1, 6), NHWC, strides=(2, 1), padding="SAME", feature_group_count=6
    ),
    "depthwise, more outputs": case(
        (2, 6, 5, 4), (3, 2, 1, 12), NHWC, dilation=(1, 2), padding="SAME", feature_group_count=4
    ),
    "batch groups": case((6, 5, 5, 4), (3, 3, 4, 9), NHWC, padding="SAME", batch_group_count=3),
    "transposed": case((2, 4, 5, 6), (4, 4, 6, 3), NHWC, holes=(2, 2), padding=((2, 2), (2, 2))),
    "transposed, uneven": case(
        (2, 4, 5, 6), (3, 2, 6, 3), NHWC, holes=(2, 3), padding=((2, -1), (0, 5))
    ),
    "transposed, strided and dilated": case(
        (2, 4, 5, 6), (3, 3, 6, 3), NHWC,
        holes=(2, 3), strides=(1, 2), dilation=(2, 1), padding=((3, 3), (1, 4)),
    ),
    "transposed, groups": case(
        (2, 4, 4, 6), (3, 3, 2, 9), NHWC,
        holes=(2, 2), padding=((2, 1), (2, 1)), feature_group_count=3,
    ),
    "transposed, gaps": case(
        (2, 4, 4, 3), (1, 2, 3, 2), NHWC, holes=(3, 3), padding=((0, 0), (0, 0))
    ),
    "3-D": case((2, 4, 5, 3, 3), (2, 3, 2, 3, 4), NDHWC, strides=(1, 2, 1), padding="SAME"),
}  # fmt: skip
ZEROS = {np.int8: -7, np.uint8: 200}


@functools.cache
def codes(name: str, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    x_shape, w_shape, _ = CASES[name]
    rng = np.random.default_rng(0)
    low = np.iinfo(dtype).min
    x = rng.integers(low, low + 256, x_shape).astype(dtype)
    return x, rng.integers(-128, 128, w_shape).astype(np.int8)


@functools.cache
def params(name: str) -> dict:
    """The parameters of the primitive, which has its padding in pairs."""
    x, w, kwargs = CASES[name]
    run = functools.partial(lax.conv_general_dilated, **kwargs)
    (eqn,) = jax.make_jaxpr(run)(jnp.zeros(x), jnp.zeros(w)).eqns
    other = ("precision", "preferred_element_type", "out_sharding")
    return {key: value for key, value in eqn.params.items() if key not in other}


def reference(x: np.ndarray, w: np.ndarray, zero: int, p: dict) -> np.ndarray:
    """One output position at a time, in int64."""
    numbers = p["dimension_numbers"]
    x = x.transpose(numbers.lhs_spec).astype(np.int64)  # batch, channels, space
    w = w.transpose(numbers.rhs_spec).astype(np.int64)  # outputs, channels, window
    holes = [(n - 1) * d + 1 for n, d in zip(x.shape[2:], p["lhs_dilation"], strict=True)]
    full = np.full((*x.shape[:2], *holes), zero)
    full[(..., *(slice(None, None, d) for d in p["lhs_dilation"]))] = x
    for a, (low, high) in enumerate(p["padding"], 2):
        edges = [(0, 0)] * x.ndim
        edges[a] = (max(low, 0), max(high, 0))
        full = np.pad(full, edges, constant_values=zero)
        full = np.moveaxis(full, a, 0)
        full = full[max(-low, 0) : full.shape[0] - max(-high, 0)]
        full = np.moveaxis(full, 0, a)
    reach = [(k - 1) * d + 1 for k, d in zip(w.shape[2:], p["rhs_dilation"], strict=True)]
    steps = zip(full.shape[2:], reach, p["window_strides"], strict=True)
    places = [max(0, (n - r) // s + 1) for n, r, s in steps]
    features, batches = p["feature_group_count"], p["batch_group_count"]
    y = np.zeros((x.shape[0] // batches, w.shape[0], *places), np.int64)
    per_group = w.shape[0] // (features * batches)
    for o, place in itertools.product(range(w.shape[0]), itertools.product(*map(range, places))):
        group = o // per_group
        rows = slice(None), slice(None)
        if features > 1:
            rows = slice(None), slice(group * w.shape[1], (group + 1) * w.shape[1])
        if batches > 1:
            rows = slice(group * y.shape[0], (group + 1) * y.shape[0]), slice(None)
        moves = zip(place, p["window_strides"], reach, p["rhs_dilation"], strict=True)
        seen = full[(*rows, *(slice(i * s, i * s + r, d) for i, s, r, d in moves))]
        y[(slice(None), o, *place)] = (seen * w[o]).sum(tuple(range(1, x.ndim)))
    return y.transpose(np.argsort(numbers.out_spec))


# Daily each dimension, layout, way to take patches, and kind of group once; others that are plain
# go outside jit, below.
CORE = (
    *("1-D, channels first", "mixed layout", "rows apart", "strided", "1x1, strided", "tiles"),
    *("negative padding", "no place", "groups", "depthwise, more outputs"),
    *("transposed, strided and dilated", "3-D"),
)


@pytest.mark.parametrize("name, dtype", dealt(daily(CASES, CORE), ZEROS))
def test_sums_are_exact(name, dtype):
    (x, w), zero, p = codes(name, dtype), ZEROS[dtype], params(name)
    expected = reference(x, w, zero, p)
    got = jax.jit(functools.partial(integer_conv, **p))(x, w, pad_value=dtype(zero))
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", ["2-D", "batch groups", "depthwise", "transposed"])
def test_it_runs_outside_jit(name):
    (x, w), p = codes(name, np.uint8), params(name)
    got = integer_conv(jnp.asarray(x), jnp.asarray(w), pad_value=200, **p)
    np.testing.assert_array_equal(got, reference(x, w, 200, p))


@pytest.mark.parametrize(
    "name, dtype, form", dealt(["rows apart", "groups"], ZEROS, ["u8s8", "s8s8", "float32"])
)
def test_every_product_serves_both_types_of_codes(name, dtype, form):
    (x, w), zero, p = codes(name, dtype), ZEROS[dtype], params(name)
    with force(form):
        got = jax.jit(functools.partial(integer_conv, pad_value=zero, **p))(x, w)
    np.testing.assert_array_equal(got, reference(x, w, zero, p))


@pytest.mark.parametrize("name", daily(CASES, list(CASES)[1::3]))
def test_the_native_form_is_exact(name, monkeypatch):
    same_as_reference_by(conv._on_tpu, name, np.uint8, monkeypatch)


@pytest.mark.parametrize(
    "name, dtype", dealt(["2-D", "mixed layout", "groups", "depthwise"], ZEROS)
)
def test_the_form_of_gpus_is_exact(name, dtype, monkeypatch):
    same_as_reference_by(conv._elsewhere, name, dtype, monkeypatch)


def same_as_reference_by(form, name, dtype, monkeypatch) -> None:
    (x, w), zero, p = codes(name, dtype), ZEROS[dtype], params(name)
    monkeypatch.setattr(conv, "_bind", form)
    got = jax.jit(functools.partial(integer_conv, pad_value=zero, **p))(x, w)
    np.testing.assert_array_equal(got, reference(x, w, zero, p))


@pytest.mark.parametrize("name", ["channels first", "transposed", "mixed layout"])
def test_each_example_may_have_its_own_code_of_zero(name):
    (x, w), p = codes(name, np.uint8), params(name)
    axes = p["dimension_numbers"].lhs_spec[0], p["dimension_numbers"].out_spec[0]
    zeros = np.arange(7, 250, 40, dtype=np.uint8)[: x.shape[axes[0]]]
    got = jax.jit(functools.partial(integer_conv, **p))(x, w, pad_value=zeros)
    for i, zero in enumerate(zeros):
        one = reference(np.take(x, [i], axes[0]), w, int(zero), p)
        np.testing.assert_array_equal(np.take(got, [i], axes[1]), one)


@pytest.mark.parametrize(
    "limit, steps", dealt([1, 1500, 7000], [((1, 1), (1, 1)), ((2, 1), (1, 2))])
)
def test_blocks_of_any_size_give_the_same(limit, steps):
    strides, dilation = steps
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.integers(0, 256, (5, 16, 9, 7)), jnp.uint8)
    w = jnp.asarray(rng.integers(-128, 128, (3, 3, 7, 4)), jnp.int8)
    run = jax.jit(
        functools.partial(convolve, window=Window((3, 3), strides, dilation)),
        static_argnames="limit",
    )
    np.testing.assert_array_equal(run(x, w, limit=limit), run(x, w, limit=2**40))


@pytest.mark.parametrize(
    "name, axes",
    dealt(["mixed layout", "groups", "depthwise", "batch groups"], [(2, None), (None, 3), (1, 2)]),
)
def test_vmap(name, axes):
    (x, w), p = codes(name, np.uint8), params(name)
    x, w = (
        jnp.asarray(a) if d is None else jnp.stack([a, np.flip(a)], d)
        for a, d in zip((x, w), axes, strict=True)
    )
    run = functools.partial(integer_conv, pad_value=9, **p)
    got = jax.jit(jax.vmap(run, axes))(x, w)
    for i in range(2):
        one = [a if d is None else jnp.take(a, i, d) for a, d in zip((x, w), axes, strict=True)]
        np.testing.assert_array_equal(got[i], reference(*map(np.asarray, one), 9, p))


def test_vmap_over_the_code_of_zero():
    (x, w), p = codes("transposed", np.uint8), params("transposed")
    x, w, zeros = jnp.asarray(x), jnp.asarray(w), jnp.array([3, 250], jnp.uint8)
    got = jax.jit(jax.vmap(lambda zero: integer_conv(x, w, pad_value=zero, **p)))(zeros)
    for y, zero in zip(got, (3, 250), strict=True):
        np.testing.assert_array_equal(y, reference(np.asarray(x), np.asarray(w), zero, p))


def test_patches_of_a_large_batch_are_never_all_there():
    x, w, kwargs = case((256, 32, 32, 32), (3, 3, 32, 32), NHWC)
    p = {"padding": ((1, 1), (1, 1)), **kwargs} | {"padding": ((1, 1), (1, 1))}
    p["dimension_numbers"] = lax.conv_dimension_numbers(x, w, NHWC)
    run = jax.jit(functools.partial(integer_conv, pad_value=0, **p))
    shapes = jax.ShapeDtypeStruct(x, jnp.int8), jax.ShapeDtypeStruct(w, jnp.int8)
    temporary = run.lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    codes_and_sums = math.prod(x) * (1 + 4 + 2)  # padded, and shifted
    assert temporary < codes_and_sums + 8 * conv.CPU_PATCHES < 9 * math.prod(x)


@pytest.mark.parametrize(
    "name", daily(["2-D", "groups", "depthwise", "transposed", "3-D"], ["groups", "transposed"])
)
def test_it_exports_to_three_platforms_at_once(name):
    (x, w), p = codes(name, np.uint8), params(name)
    x, w = jnp.asarray(x), jnp.asarray(w)
    run = jax.jit(functools.partial(integer_conv, pad_value=200, **p))
    data = jax.export.export(run, platforms=["cpu", "cuda", "tpu"])(x, w).serialize()
    got = jax.export.deserialize(data).call(x, w)
    np.testing.assert_array_equal(got, reference(np.asarray(x), np.asarray(w), 200, p))


@pytest.mark.parametrize(
    "name, lengths", dealt(["rows apart", "groups", "transposed"], ["b, h, w, c", "b, 6, 5, c"])
)
def test_it_exports_for_any_batch_and_size(name, lengths):
    (x, w), p = codes(name, np.int8), params(name)
    x, w = jnp.asarray(x), jnp.asarray(w)
    lengths = lengths.replace("6, 5", "{}, {}".format(*x.shape[1:3])).replace("c", str(x.shape[3]))
    constraints = ["h >= 4", "w >= 4"] if "h" in lengths else []
    shape = jax.export.symbolic_shape(lengths, constraints=constraints)
    run = jax.jit(functools.partial(integer_conv, pad_value=3, **p))
    exported = jax.export.export(run)(
        jax.ShapeDtypeStruct(shape, jnp.int8), jax.ShapeDtypeStruct(w.shape, jnp.int8)
    )
    got = exported.call(x, w)
    np.testing.assert_array_equal(got, reference(np.asarray(x), np.asarray(w), 3, p))


def test_what_is_no_code_is_refused():
    (x, w), p = codes("2-D", np.uint8), params("2-D")
    x, w = jnp.asarray(x), jnp.asarray(w)
    with pytest.raises(TypeError, match="expected int8 or uint8 and int8, got int32 and int8"):
        integer_conv.__wrapped__(x.astype(jnp.int32), w, pad_value=0, **p)  # unchecked, as in use
    with pytest.raises(ValueError, match="pad_value -1 is no code of uint8"):
        integer_conv(x, w, pad_value=-1, **p)


LAYERS = {
    "first": (case((256, 28, 28, 1), (3, 3, 1, 32), NHWC), False),
    "color": (case((32, 32, 32, 3), (3, 3, 3, 16), NHWC, padding="SAME"), False),
    "16 to 16": (case((32, 32, 32, 16), (3, 3, 16, 16), NHWC, padding="SAME"), False),
    "32 to 64": (case((256, 26, 26, 32), (3, 3, 32, 64), NHWC), True),
    "32 to 64, in steps": (
        case((256, 16, 16, 32), (3, 3, 32, 64), NHWC, strides=(2, 2), padding="SAME"),
        False,
    ),
    "64 to 64, one image": (case((1, 8, 8, 64), (3, 3, 64, 64), NHWC, padding="SAME"), False),
    "64 to 64": (case((32, 8, 8, 64), (3, 3, 64, 64), NHWC, padding="SAME"), True),
    "1x1, narrow": (case((32, 28, 28, 32), (1, 1, 32, 192), NHWC), False),
    "1x1, wide": (case((32, 14, 14, 256), (1, 1, 256, 256), NHWC), True),
    "tiles of an image": (
        case((1, 224, 224, 3), (16, 16, 3, 384), NHWC, strides=(16, 16)),
        True,
    ),
    "groups, 1x1": (case((32, 28, 28, 64), (1, 1, 32, 64), NHWC, feature_group_count=2), False),
    "groups": (case((1, 14, 14, 64), (3, 3, 16, 64), NHWC, feature_group_count=4), True),
    "three axes": (case((1, 8, 8, 8, 8), (3, 3, 3, 8, 8), NDHWC), True),
    "transposed": (
        case((32, 8, 8, 256), (4, 4, 256, 128), NHWC, holes=(2, 2), padding=((2, 2), (2, 2))),
        True,
    ),
    "transposed, to an image": (
        case((32, 32, 32, 32), (4, 4, 32, 3), NHWC, holes=(2, 2), padding=((2, 2), (2, 2))),
        False,
    ),
    "steps over holes": (
        case(
            (1, 8, 8, 64), (3, 3, 64, 64), NHWC, holes=(2, 2), strides=(2, 2), padding=((2, 2),) * 2
        ),
        False,
    ),
    "depthwise": (case((1, 14, 14, 64), (3, 3, 1, 64), NHWC, feature_group_count=64), True),
    "channels first": (case((32, 64, 16, 16), (64, 64, 3, 3), None), True),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_form_is_the_measured_one(name, monkeypatch):
    layer, integers = LAYERS[name]
    monkeypatch.setitem(CASES, name, layer)
    why = prefers_integers(layer[0], layer[1], **params.__wrapped__(name))
    assert (why == "") == integers, why
