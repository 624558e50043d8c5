"""Is a product with a quantized weight, read as codes, the float product of its values?"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import quantjax as qj
from quantjax.formats import Levels, e4m3, nf4
from quantjax.ops import blocked, fits_weight_only, weight_only, weight_only_dot
from quantjax.ops.vector import count_terms
from tests.daily import daily, dealt

from .reference import dot_general

INT4 = qj.IntFormat(4)
FORMATS = {
    "int8": dict(format=qj.IntFormat(8)),
    "uint8, zero point": dict(format=qj.IntFormat(8, signed=False), symmetric=False),
    "int4": dict(format=INT4),
    "int4, zero point": dict(format=INT4, symmetric=False),
    "int3": dict(format=qj.IntFormat(3)),
    "binary": dict(format=qj.IntFormat(1, levels=Levels.HALF)),
    "int4, quantized scales": dict(format=INT4, scale_format=qj.IntFormat(8, signed=False)),
    "nf4": dict(format=nf4),
    "e4m3": dict(format=e4m3),
}
# Shape, summed axes, and the axis along which a group lies.
LAYOUTS = {
    "plain": ((256, 24), (0,), 0),
    "transposed": ((24, 256), (1,), 1),
    "heads": ((256, 3, 8), (0,), 0),
    "sum over heads": ((4, 64, 24), (0, 1), 1),
    "transposed heads": ((24, 4, 64), (1, 2), 2),
    "groups over heads": ((8, 32, 24), (0, 1), 0),
    "a short last group": ((200, 24), (0,), 0),
    "an odd length": ((24, 85), (1,), 1),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small weights too, in blocks of a few rows."""
    monkeypatch.setattr(weight_only, "SMALL_WEIGHT", 0)
    monkeypatch.setattr(blocked, "BLOCK_ELEMENTS", 600)
    weight_only._compiled.clear_cache()


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def weight(layout, group=None, **spec):
    shape, axes, along = LAYOUTS[layout]
    block = tuple(None if a in axes else 1 for a in range(len(shape)))
    if group:
        block = tuple(group if a == along else 1 for a in range(len(shape)))
    spec = qj.QuantSpec(block=block, **spec)
    return qj.quantize({"w": normal(*shape, seed=1)}, qj.Policy([("w", spec)]))["w"]


def problem(layout, rows, **spec):
    """x with its summed axes last, a weight, and the numbers of their product."""
    shape, axes, _ = LAYOUTS[layout]
    x = normal(rows, *(shape[a] for a in axes))
    return x, weight(layout, **spec), ((tuple(range(1, x.ndim)), axes), ((), ()))


def check(got, x, q, numbers):
    """The bound of the docstring: n + 4 roundings of float32 to the product in float64."""
    w, x = np.asarray(qj.dequantize(q)), np.asarray(x)
    expected, size = (dot_general(f(x), f(w), numbers) for f in (np.asarray, np.abs))
    terms = math.prod(q.shape[a] for a in numbers[0][1])
    assert got.shape == expected.shape and got.dtype == jnp.float32
    # 2 more: the values that are compared with are rounded themselves.
    assert np.all(np.abs(got - expected) <= (terms + 6) * 2.0**-24 * size)


# Every layout with a packed format, and every format in one of two layouts; then in both, with and
# without groups. Daily are the layouts that lie otherwise than one matrix, and of the formats one
# for each way to read codes.
CASES = [("int4, zero point", layout, 32) for layout in LAYOUTS]
CASES += [
    (name, *(("plain", (None, 32)[i // 2 % 2]), ("transposed", (32, None)[i // 2 % 2]))[i % 2])
    for i, name in enumerate(FORMATS)
]
DAILY = {
    case
    for case in CASES
    if case[0] in ("int8", "binary", "int4, quantized scales", "nf4")
    or case[1] in [*LAYOUTS][3:]
    and case[0] == "int4, zero point"
}
CASES += [("int8", "sum over heads", None), ("int4", "transposed heads", None)]
CASES += [("int8", "a short last group", None), ("int8", "heads", None)]
CASES += [(n, lay, g) for n in FORMATS for lay in ("plain", "transposed") for g in (None, 32)]
CASES = [
    pytest.param(*case, marks=[] if case in DAILY else pytest.mark.full)
    for case in dict.fromkeys(CASES)
]


@pytest.mark.parametrize("name, layout, group", CASES)
def test_it_is_the_float_product(name, layout, group):
    group = 2 if layout == "groups over heads" else group
    for rows in (1, 3):
        x, q, numbers = problem(layout, rows, group=group, **FORMATS[name])
        assert fits_weight_only(x, q, numbers) == ""
        check(weight_only_dot(x, q, numbers), x, q, numbers)


@pytest.mark.parametrize(
    "name, layout, group, terms",
    [
        ("int8", "plain", None, 32),
        ("int8", "plain", 16, 16),
        ("int4", "plain", 32, 16),
        ("int3", "sum over heads", None, 16),
        ("int8", "transposed", None, 16),
        ("int4", "transposed", 32, 16),
        ("int3", "transposed", None, 0),  # three bytes of eight codes are no vector
        ("int8", "plain", 12, 0),  # no terms divide a group, and the last group is short
        ("nf4", "plain", None, 0),
    ],
)
def test_how_many_terms_a_vector_product_has(name, layout, group, terms):
    assert count_terms(weight(layout, group, **FORMATS[name]), LAYOUTS[layout][1]) == terms


@pytest.mark.parametrize("rows", daily([0, 1, 2, 8], [0, 2, 8]))
def test_rows_in_several_axes_that_are_not_first(rows):
    q = weight("plain", format=qj.IntFormat(8))
    x, numbers = normal(256, rows, 2), (((0,), (0,)), ((), ()))
    check(weight_only_dot(x, q, numbers), x, q, numbers)


def test_summed_axes_in_any_order():
    q = weight("sum over heads", format=INT4)
    x, numbers = normal(64, 2, 4), (((0, 2), (1, 0)), ((), ()))
    check(weight_only_dot(x, q, numbers), x, q, numbers)


def test_a_bfloat16_weight_and_activation_are_computed_in_float32():
    x, q, numbers = problem("plain", 2, format=qj.IntFormat(8))
    stored = dataclasses.replace(q, dtype=jnp.dtype(jnp.bfloat16))
    x = x.astype(jnp.bfloat16)
    check(weight_only_dot(x, stored, numbers), x, q, numbers)


@pytest.mark.parametrize(
    "name, layout, rows", dealt(["int8", "int4", "nf4"], ["plain", "transposed"], [1, 5])
)
def test_nan_and_infinity_do_what_they_do_in_floats(name, layout, rows):
    bad = {"nan": [np.nan], "inf": [np.inf], "-inf": [-np.inf], "both": [np.inf, np.inf]}
    for what, values in bad.items():
        x, q, numbers = problem(layout, rows, **FORMATS[name])
        for i, value in enumerate(values):
            x = x.at[0, 7 * i + 3].set(value)
        got = weight_only_dot(x, q, numbers)
        w = np.asarray(qj.dequantize(q))
        with np.errstate(invalid="ignore"):
            expected = np.asarray(x) @ (w if layout == "plain" else w.T)
        for test in (np.isnan, np.isposinf, np.isneginf):
            np.testing.assert_array_equal(test(got), test(expected), err_msg=what)


def test_the_gradient_is_that_of_the_float_product():
    x, q, numbers = problem("plain", 2, format=INT4)
    got = jax.grad(lambda x: (weight_only_dot(x, q, numbers) ** 2).sum())(x.astype(jnp.bfloat16))
    expected = jax.grad(lambda x: ((x @ qj.dequantize(q)) ** 2).sum())(x)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), expected, rtol=0.03, atol=1)
    none = jax.grad(lambda q: weight_only_dot(x, q, numbers).sum(), allow_int=True)(q)
    np.testing.assert_array_equal(none.scale, 0)


def floats(x, q, numbers):
    return lax.dot_general(x, qj.dequantize(q), numbers)


@pytest.mark.parametrize("many", [6, 300])
def test_vmap_over_x_is_more_rows(many):
    _, q, numbers = problem("plain", 1, format=INT4)
    x = normal(many, 1, 256)
    run = jax.vmap(lambda x: weight_only_dot(x, q, numbers), 0)
    np.testing.assert_allclose(run(x), floats(x.reshape(-1, 256), q, numbers)[:, None], atol=1e-4)
    # One product of all rows: in blocks, or with too many of them in digits.
    text = jax.jit(run).lower(x).as_text()
    assert (f"{many}x24xi32" in text or f"{3 * many}x24xi32" in text) == (many == 300)
    gradient = jax.grad(lambda x: run(x).sum())(x)
    np.testing.assert_allclose(gradient[0, 0], qj.dequantize(q).sum(1), atol=1e-4)


def test_vmap_and_scan_over_stacked_weights():
    layers = [weight("plain", format=INT4), weight("plain", format=INT4)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *layers)
    x, numbers = normal(1, 256), (((1,), (0,)), ((), ()))
    expected = jnp.stack([floats(x, q, numbers) for q in layers])
    mapped = jax.vmap(lambda q: weight_only_dot(x, q, numbers))(stacked)
    np.testing.assert_allclose(mapped, expected, atol=1e-4)
    both = jax.vmap(lambda x, q: weight_only_dot(x, q, numbers))(jnp.stack([x, x]), stacked)
    np.testing.assert_allclose(both, expected, atol=1e-4)
    _, scanned = lax.scan(lambda _, q: (None, weight_only_dot(x, q, numbers)), None, stacked)
    np.testing.assert_allclose(scanned, expected, atol=1e-4)


REFUSED = {
    "batch axes": ((2, 3, 8), (2, 8, 16), (((2,), (1,)), ((0,), (0,)))),
    "neither the first nor the last": ((3, 8), (16, 8, 4), (((1,), (1,)), ((), ()))),
    "summed away": ((8, 16), (8, 16), (((0, 1), (0, 1)), ((), ()))),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_not_served_says_why(why):
    x_shape, shape, numbers = REFUSED[why]
    spec = qj.QuantSpec(format=INT4, block=(None,) * len(shape))
    q = qj.quantize({"w": normal(*shape)}, qj.Policy([("w", spec)]))["w"]
    assert why in fits_weight_only(jax.ShapeDtypeStruct(x_shape, jnp.float32), q, numbers)


def test_small_and_coarse_weights_and_symbols_say_why(monkeypatch):
    x, q, numbers = problem("plain", 1, **FORMATS["nf4"])
    (rows,) = jax.export.symbolic_shape("b")
    assert "not known" in fits_weight_only(
        jax.ShapeDtypeStruct((rows, 256), jnp.float32), q, numbers
    )
    monkeypatch.setattr(blocked, "BLOCK_LIMIT", 20)
    assert "rows too long" in fits_weight_only(x, q, numbers)
    monkeypatch.setattr(weight_only, "SMALL_WEIGHT", 10**6)
    assert "a small weight (6144 < 1000000)" in fits_weight_only(x, q, numbers)


@pytest.mark.parametrize(
    "preset, layout, rows", dealt(["w8", "w4g64", "nf4g64"], ["leading", "trailing"], [1, 2, 8])
)
def test_no_float_copy_of_the_weight_is_made(preset, layout, rows, monkeypatch):
    monkeypatch.setattr(blocked, "BLOCK_ELEMENTS", 2**14)
    leading = layout == "leading"
    name = "kernel" if leading else "weight"
    q = qj.quantize({name: normal(1024, 1024)}, preset)[name]
    numbers = (((1,), (0 if leading else 1,)), ((), ()))
    run = jax.jit(lambda x, q: weight_only_dot(x, q, numbers))
    memory = run.lower(normal(rows, 1024), q).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.25 * 4 * 1024 * 1024


def test_it_exports_to_three_platforms_at_once():
    x, q, numbers = problem("plain", 1, format=INT4)
    run = jax.jit(lambda x: weight_only_dot(x, q, numbers))
    data = jax.export.export(run, platforms=["cpu", "cuda", "tpu"])(x).serialize()
    np.testing.assert_allclose(jax.export.deserialize(data).call(x), run(x), rtol=1e-6)


@pytest.mark.parametrize("spec, rows", dealt([P(None, "d"), P("d", None)], [1, 8]))
def test_a_sharded_weight_is_multiplied_where_it_lies(spec, rows):
    q = qj.quantize({"kernel": normal(512, 64)}, "w4g64")["kernel"]
    numbers, x = (((1,), (0,)), ((), ())), normal(rows, 512)
    run = jax.jit(lambda x, q: weight_only_dot(x, q, numbers))
    mesh = Mesh(np.array(jax.devices()[:8]), ("d",))
    sharded = jax.device_put(q, NamedSharding(mesh, spec))
    compiled = run.lower(x, sharded).compile()
    np.testing.assert_allclose(compiled(x, sharded), run(x, q), atol=1e-4)
    # Blocks are slices of the first axis: where that is sharded, codes are gathered.
    blocks_cut = rows > 2 and spec == P("d", None)
    assert ("all-gather(" in compiled.as_text()) == blocks_cut
