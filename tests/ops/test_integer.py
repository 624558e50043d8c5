"""Is the integer product exact, in every form, for all dimension numbers, mapped and exported?"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from quantjax.ops import Probe, force, integer, integer_dot_general
from quantjax.ops.forms import FORMS
from quantjax.ops.integer import _signed, integer_p
from tests.daily import daily, dealt

from .reference import dot_general

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (4, 3, 70)).astype(np.uint8)
W = RNG.integers(-128, 128, (4, 70, 5)).astype(np.int8)
X[0, 0], W[0, :, 0] = 255, -128  # the largest sums there are
PLAIN = (((1,), (0,)), ((), ()))
BATCHED = (((2,), (1,)), ((0,), (0,)))
CASES = {
    "matrix": (X[0], W[0], PLAIN),
    "one row": (X[0, :1], W[0], PLAIN),
    "one column": (X[0], W[0, :, :1], PLAIN),
    "one of each": (X[0, :1], W[0, :, :1], PLAIN),
    "both transposed": (X[0].T, W[0].T, (((0,), (1,)), ((), ()))),
    "batch": (X, W, BATCHED),
    "batch of single rows": (X[:, :1], W, BATCHED),
    "batch within": (X.transpose(1, 0, 2), W.transpose(1, 2, 0), (((2,), (0,)), ((1,), (2,)))),
    "batch of single columns, last": (X, W[:, :, 0].T, (((2,), (0,)), ((0,), (1,)))),
    "several rows and columns": (X, RNG.integers(-128, 128, (2, 70, 3)).astype(np.int8),
        (((2,), (1,)), ((), ()))),
    "two sums": (X, RNG.integers(-128, 128, (3, 70, 5)).astype(np.int8),
        (((1, 2), (0, 1)), ((), ()))),
    "two sums, in another order": (X, RNG.integers(-128, 128, (70, 5, 3)).astype(np.int8),
        (((1, 2), (2, 0)), ((), ()))),
    "vectors": (X[0, 0], W[0, :, 0], (((0,), (0,)), ((), ()))),
    "no sum": (X[0], W[0], (((), ()), ((), ()))),
    "no rows": (X[0, :0], W[0], PLAIN),
    "an empty sum": (X[0, :, :0], W[0, :0], PLAIN),
    # Of odd and even codes near the extremes: float32 would round the sum.
    "a long sum": (RNG.integers(250, 256, (2, 5000)).astype(np.uint8),
        RNG.integers(-128, -120, (5000, 3)).astype(np.int8), PLAIN),
}  # fmt: skip


def exact(x, w, numbers):
    """float64 holds integers up to 2^53."""
    return dot_general(x, w, numbers).astype(np.int32)


def as_type(x, dtype):
    """The same bits less the highest one: both types meet their extremes."""
    return (x ^ np.uint8(128)).view(np.int8) if dtype == np.int8 else x


CORE = (
    *("both transposed", "batch of single columns, last", "two sums", "no rows"),
    "a long sum",
)


@pytest.mark.parametrize("name, dtype", dealt(daily(CASES, CORE), [np.uint8, np.int8]))
def test_sums_are_exact(name, dtype):
    x, w, numbers = CASES[name]
    x, w = jnp.asarray(as_type(x, dtype)), jnp.asarray(w)
    expected = exact(x, w, numbers)
    got = {"other platforms": _signed(x, w, dimension_numbers=numbers, form=None)}
    for form in FORMS:
        with force(form):
            got[form] = jax.jit(lambda x, w: integer_dot_general(x, w, numbers))(x, w)
            got[f"{form}, eager"] = integer_dot_general(x, w, numbers)
    for form, y in got.items():
        assert y.dtype == jnp.int32, form
        np.testing.assert_array_equal(y, expected, err_msg=form)


LONG = RNG.integers(250, 256, (3, 2, 560)).astype(np.uint8)  # sums float32 would round
TALL = RNG.integers(-128, -120, (2, 560, 5)).astype(np.int8)
LONG[0], TALL[0, :, 0] = 255, -128  # the largest sums
VECTORS = {
    "a row": (LONG[0, :1], TALL[0], PLAIN),
    "two rows in other axes": (LONG[:1].T, TALL[0], (((0,), (0,)), ((), ()))),
    "a vector": (LONG[0, 0], TALL[0], (((0,), (0,)), ((), ()))),
    "two sums, in another order": (LONG[:2].T, TALL, (((0, 2), (1, 0)), ((), ()))),
    "several columns": (LONG[0], TALL[0].reshape(560, 5, 1), PLAIN),
    "exactly as many as are exact": (LONG[0, :, :512], TALL[0, :512], PLAIN),
}


@pytest.mark.parametrize("name, dtype", dealt(VECTORS, [np.uint8, np.int8]))
def test_few_rows_go_vector_by_vector_exactly(name, dtype, monkeypatch):
    monkeypatch.setattr(integer, "VECTOR_CODES", 0)
    x, w, numbers = VECTORS[name]
    x, w = jnp.asarray(as_type(x, dtype)), jnp.asarray(w)
    run = jax.jit(lambda x, w: integer_dot_general(x, w, numbers))
    text = run.lower(x, w).as_text()
    assert "i32" in text and not re.search(r"dot_general .*xi8>", text)
    np.testing.assert_array_equal(run(x, w), exact(x, w, numbers))


def test_which_products_go_vector_by_vector(monkeypatch):
    monkeypatch.setattr(integer, "probe", lambda: Probe("s8s8"))

    def vectors(x, w, numbers=PLAIN):
        run = jax.jit(lambda x, w: integer_dot_general(x, w, numbers))
        text = run.lower(*(jax.ShapeDtypeStruct(shape, jnp.int8) for shape in (x, w))).as_text()
        return not re.search(r"dot_general .*xi8>", text)

    assert vectors((2, 2048), (2048, 1024))
    assert not vectors((3, 2048), (2048, 1024))
    assert not vectors((2, 2048), (2048, 1016))  # a small weight
    assert not vectors((2, 2047), (2047, 1032))  # no terms divide the sum
    assert not vectors((2, 2048), (1024, 2048), (((1,), (1,)), ((), ())))
    assert not vectors((1, 2, 2048), (1, 2048, 1024), BATCHED)
    with force("s8s8"):
        assert not vectors((2, 2048), (2048, 1024))


def operands(x):
    """The types of the one product in the lowered program, with its rows."""
    text = jax.jit(lambda x, w: integer_dot_general(x, w, PLAIN)).lower(x, W[0]).as_text()
    return re.findall(r"dot_general .*: \((.*?)\)", text)


def test_the_probe_or_force_chooses_the_form(monkeypatch):
    u8, s8 = jnp.asarray(X[0]), jnp.asarray(as_type(X[0], np.int8))
    # A row of ones goes below x where x has the other sign.
    cases = [("u8s8", u8, "3x70xui8"), ("u8s8", s8, "4x70xui8")]
    cases += [("s8s8", u8, "4x70xi8"), ("s8s8", s8, "3x70xi8"), ("float32", s8, "3x70xf32")]
    for form, x, first in cases:
        wide = "f32" if form == "float32" else "i8"
        with force(form):
            assert operands(x) == [f"tensor<{first}>, tensor<70x5x{wide}>"]
        monkeypatch.setattr(integer, "probe", lambda form=form: Probe(form))
        assert operands(x) == [f"tensor<{first}>, tensor<70x5x{wide}>"]
    with pytest.raises(ValueError, match=r"expected one of \['u8s8', .* got 's4'"), force("s4"):
        pass


@pytest.mark.parametrize(
    "form, axes",
    dealt(FORMS, [(0, None), (1, None), (2, None), (None, 0), (None, 1), (None, 2)]),
)
def test_vmap_over_one_operand(axes, form):
    x = jnp.asarray(X[0] if axes[0] is None else np.moveaxis(X, 0, axes[0]))
    w = jnp.asarray(W[0] if axes[1] is None else np.moveaxis(W, 0, axes[1]))
    with force(form):
        got = jax.vmap(lambda x, w: integer_dot_general(x, w, PLAIN), axes)(x, w)
    for i, y in enumerate(got):
        pairs = zip(map(np.asarray, (x, w)), axes, strict=True)
        one = [a if d is None else np.take(a, i, d) for a, d in pairs]
        np.testing.assert_array_equal(y, exact(*one, PLAIN))


@pytest.mark.parametrize("axes", [(0, 0), (2, 1), (1, 2)])
def test_vmap_over_both(axes):
    x, w = (jnp.asarray(np.moveaxis(a, 0, d)) for a, d in zip((X, W), axes, strict=True))
    got = jax.vmap(lambda x, w: integer_dot_general(x, w, PLAIN), axes)(x, w)
    np.testing.assert_array_equal(got, exact(X, W, BATCHED))


def test_vmap_of_a_batched_product():
    x, w = jnp.stack([X, X[::-1]], 1), jnp.asarray(W)
    got = jax.vmap(lambda x: integer_dot_general(x, w, BATCHED), 1)(x)
    expected = np.stack([exact(X, W, BATCHED), exact(X[::-1], W, BATCHED)])
    np.testing.assert_array_equal(got, expected)


def test_it_serves_in_a_scan():
    _, got = lax.scan(
        lambda _, w: (None, integer_dot_general(jnp.asarray(X[0]), w, PLAIN)), None, jnp.asarray(W)
    )
    np.testing.assert_array_equal(got, [exact(X[0], w, PLAIN) for w in W])


def test_other_types_are_refused():
    x = jnp.zeros((2, 2), jnp.int8)
    for bad in (x.astype(jnp.int16), x.astype(jnp.float32)):
        with pytest.raises(TypeError, match=f"expected int8 or uint8 and int8, got {bad.dtype}"):
            integer_p.bind(bad, x, dimension_numbers=PLAIN, form=None)


@pytest.mark.parametrize("dtype, form", dealt([np.uint8, np.int8], [None, *FORMS]))
def test_it_exports_to_three_platforms_at_once(dtype, form):
    x, w = jnp.asarray(as_type(X[0], dtype)), jnp.asarray(W[0])
    run = jax.jit(lambda x, w: integer_dot_general(x, w, PLAIN))
    with force(form) if form else jax.named_scope("probed"):
        data = jax.export.export(run, platforms=["cpu", "cuda", "tpu"])(x, w).serialize()
    np.testing.assert_array_equal(jax.export.deserialize(data).call(x, w), exact(x, w, PLAIN))


@pytest.mark.parametrize("form", ["u8s8", "s8s8"])
def test_it_exports_for_any_number_of_rows(form):
    (rows,) = jax.export.symbolic_shape("b")
    shape = jax.ShapeDtypeStruct((rows, 70), jnp.int8)
    with force(form):
        run = jax.jit(lambda x: integer_dot_general(x, jnp.asarray(W[0]), PLAIN))
        exported = jax.export.export(run)(shape)
    for n in (1, 3):
        x = jnp.asarray(as_type(X[0, :n], np.int8))
        np.testing.assert_array_equal(exported.call(x), exact(x, W[0], PLAIN))


@pytest.mark.parametrize("form", daily(FORMS, ["u8s8"]))
def test_rows_that_an_explicit_mesh_cuts(form):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    x = jnp.asarray(np.resize(X, (16, 70)))
    with jax.set_mesh(mesh), force(form):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        for w in (W[0], W[0][:, :1]):
            got = jax.jit(integer_dot_general, static_argnums=2)(
                jax.device_put(x, sharding), jnp.asarray(w), PLAIN
            )
            assert got.sharding.spec[0] == "data"
            np.testing.assert_array_equal(got, np.asarray(x, np.int64) @ w)
