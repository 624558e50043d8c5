"""Do an input scale and low-rank factors, kept on a leaf, mean the same in every product?"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import quantjax as qj
from quantjax.interpret import intercept, sites
from quantjax.interpret.param import param, reshaped, transposed
from quantjax.interpret.parts import cut
from quantjax.qat import prepare
from quantjax.qtensor import QTensor, is_qtensor
from tests.daily import daily

from .models import CASES, Case, normal
from .test_parts import CUTS, SPECS, STACK


def furnished(q: QTensor, varies: tuple[int, ...], summed: tuple[int, ...], kept=()) -> QTensor:
    """q with an input scale along some axes, and factors that part `summed` from the others; all
    of them along `kept` too, the axes of layers and experts."""
    rng = np.random.default_rng(len(q.shape))

    def along(axes, *more):
        return [n if a in (*axes, *kept) else 1 for a, n in enumerate(q.shape)] + list(more)

    outputs = [a for a in range(q.ndim) if a not in (*summed, *kept)]
    size = float(jnp.abs(qj.dequantize(q)).max())
    return dataclasses.replace(
        q,
        input_scale=jnp.asarray(rng.uniform(0.25, 4, along(varies)), jnp.float32),
        left=jnp.asarray(rng.normal(size=along(summed, 2)), jnp.float32),
        right=jnp.asarray(0.1 * size * rng.normal(size=along(outputs, 2)), jnp.bfloat16),
    )


def test_what_the_leaf_stands_for():
    """Against the definition in NumPy; the same bits jitted and as constants; and the same values,
    up to the order of the sum over the rank, mapped, layer by layer, and in other axes."""
    q = qj.quantize(STACK, qj.Policy([("kernel", SPECS["groups"][0])]))["kernel"]
    q = furnished(q, (1,), (1,), kept=(0,))
    x = qj.dequantize(q)
    t, left, right = (np.asarray(a, np.float64) for a in (q.input_scale, q.left, q.right))
    expected = np.asarray(qj.dequantize(q.bare), np.float64) * t + (left * right).sum(-1)
    # One rounding of each product, r of the sum, one of the last sum.
    np.testing.assert_allclose(x, expected, atol=6 * 2.0**-24 * np.abs(expected).max())
    for same in (jax.jit(qj.dequantize)(q), jax.jit(lambda: qj.dequantize(q))()):
        np.testing.assert_array_equal(same, x)
    for same in (
        jnp.stack([qj.dequantize(jax.tree.map(lambda a: a[i], q)) for i in range(4)]),  # noqa: B023
        jax.vmap(qj.dequantize)(q),
        transposed(transposed(param(q, "q"), (2, 0, 1)), (1, 2, 0)).array(),
    ):
        np.testing.assert_allclose(same, x, rtol=1e-6, atol=1e-6)
    low = qj.dequantize(dataclasses.replace(q, dtype=np.dtype(jnp.bfloat16)))
    np.testing.assert_array_equal(low, x.astype(jnp.bfloat16))
    assert q.nbytes == q.bare.nbytes + 4 * 4 * 8 + 4 * 4 * 8 * 2 + 2 * 4 * 12 * 2
    assert q.rank == 2 and "input scale, rank=2" in repr(q)


@pytest.mark.parametrize(
    "name",
    daily(["channel", "packed", "groups of all axes", "one scale"], ["packed", "one scale"]),
)
def test_cuts_and_views_take_them_along(name):
    q = qj.quantize(STACK, qj.Policy([("kernel", SPECS[name][0])]))["kernel"]
    q = furnished(q, (1,), (1,), kept=(0,))

    def both(q):
        x, found = param(q, "kernel"), {}
        values = x.array()
        for label, (axis, what) in CUTS.items():
            view = cut(x, axis, what)
            if view is not None:
                assert isinstance(view.value, QTensor) and not view.value.is_bare
                found[label] = view.array(), what.take(values, axis)
        merged = reshaped(transposed(x, (0, 2, 1)), (4, 96))
        assert merged is not None
        found["merged"] = merged.array(), values.transpose(0, 2, 1).reshape(4, 96)
        return found

    found = jax.jit(both)(q)
    assert len(found) >= 7
    for label, (got, expected) in found.items():
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6, err_msg=label)


def grouped(x, w):
    return lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
    )


def strided(x, w):
    return lax.conv_general_dilated(x, w, (2, 1), [(1, 0), (0, 2)], rhs_dilation=(1, 2))


SIZES = jnp.array([3, 0, 2], jnp.int32)
PRODUCTS = {
    # the product, the shapes, the axes of the weight that t varies along, that are summed, and that
    # both sides share; and the input times t
    "rows": (lambda x, w: x @ w, (2, 3, 8), (8, 6), (0,), (0,), (), lambda x, t: x * t[:, 0]),
    "left": (lambda x, w: w.T @ x, (8, 3), (8, 6), (0,), (0,), (), lambda x, t: x * t),
    "heads": (  # two axes out of one that is merged
        *(lambda x, w: x @ w.reshape(8, 6), (5, 8), (2, 4, 6), (0, 1), (0, 1), ()),
        lambda x, t: x * t.reshape(8),
    ),
    "shared": (
        *(lambda x, w: jnp.einsum("bek,ekn->ebn", x, w), (4, 3, 8), (3, 8, 6), (1,), (1,), (0,)),
        lambda x, t: x * t[..., 0],
    ),
    "grouped": (
        *(grouped, (2, 5, 5, 8), (3, 3, 4, 6), (2,), (0, 1, 2), ()),
        lambda x, t: x * jnp.tile(t[0, 0, :, 0], 2),
    ),
    "strided": (*(strided, (2, 5, 7, 6), (4, 5, 2, 2), (1,), (1, 2, 3), ()), lambda x, t: x * t),
    "experts": (
        *(lambda x, w: lax.ragged_dot(x, w, SIZES), (5, 8), (3, 8, 6), (1,), (1,), (0,)),
        lambda x, t: x * jnp.repeat(t[..., 0], SIZES, axis=0, total_repeat_length=5),
    ),
    "experts alike": (
        *(lambda x, w: lax.ragged_dot(x, w, SIZES), (5, 8), (3, 8, 6), (1,), (1,), ()),
        lambda x, t: x * t[0, :, 0],
    ),
}


@pytest.mark.parametrize("name", daily(PRODUCTS, ["rows", "grouped", "experts"]))
def test_a_product_is_that_of_the_scaled_input_and_a_thin_one(name):
    """With rounded activations, dynamic and (two of them) static: the same bits as the product of
    x * t with the codes, and the term of low rank beside it. Weights alone: dequantized."""
    product, x_shape, w_shape, varies, summed, kept, scaled = PRODUCTS[name]
    apply = lambda p, x: product(x, p["w"])  # noqa: E731
    w, x = normal(*w_shape, seed=3), normal(*x_shape)
    block = tuple(None if a in summed else 1 for a in range(w.ndim))
    int8 = qj.QuantSpec(format=qj.IntFormat(8))
    spec = dataclasses.replace(int8, block=block, act=int8)
    q = qj.quantize({"w": w}, qj.Policy(otherwise=spec))["w"]
    full = furnished(q, varies, summed, kept)
    scale_only = dataclasses.replace(full, left=None, right=None)
    report = intercept(apply, strict=True).report({"w": full}, x)
    (site,) = report.sites
    assert site.lowering.startswith("float, both" if name == "strided" else "int8")
    assert site.lowering.endswith("; input scaled; plus rank 2 in float")
    assert site.beside == "input scale, rank 2" and "input scale, rank 2" in str(report)
    assert 0 < site.term_flops <= report.flops - site.flops

    run = jax.jit(intercept(apply, strict=True))
    trees = [{"w": scale_only}]
    if name in ("rows", "strided"):
        trees.append(qj.calibrate(apply, trees[0], [x]))
    for tree in trees[::-1]:
        expected = run({"w": tree["w"].bare}, scaled(x, full.input_scale))
        np.testing.assert_array_equal(run(tree, x), expected)
    low_rank = qj.dequantize(dataclasses.replace(full, scale=full.scale * 0))
    got, expected = run({"w": full}, x), expected + apply({"w": low_rank}, x)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * float(abs(got).max()))

    alone = {"w": dataclasses.replace(full, act=None)}
    got, expected = run(alone, x), apply(qj.dequantize(alone), x)
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5 * float(abs(expected).max()))


def test_where_the_axes_do_not_fit_the_leaf_is_dequantized_and_that_is_said():
    """A tied matrix: its scale is for the one product, where the other sums over other axes."""
    w, x = normal(8, 6), normal(3, 8)
    q = qj.quantize({"w": w}, "w8a8")
    tied = {"w": furnished(q["w"], (0,), (0,))}

    def apply(p, x):
        return (x @ p["w"]) @ p["w"].T

    report = intercept(apply).report(tied, x)
    first, second = (site.lowering for site in report.sites)
    assert first.startswith("int8")
    assert "dequantized whole: its input scale varies along axes" in second
    exact = apply(qj.dequantize(tied), x)
    got = jax.jit(intercept(apply))(tied, x)
    assert jnp.linalg.norm(got - exact) <= 0.03 * jnp.linalg.norm(exact)


def test_rows_of_a_table():
    """Looked up as codes; the same bits as rows of the dequantized table. The scale may vary along
    rows, as that of a head tied to it does not, and along both."""
    apply = lambda p, i: jnp.take(p["embedding"], i, axis=0)  # noqa: E731
    q = qj.quantize({"embedding": normal(10, 6)}, "w8")["embedding"]
    index = jnp.array([[3, 9], [0, 3], [11, 1]])
    for varies, summed in (((1,), (1,)), ((0,), (0,)), ((0, 1), (1,))):
        tree = {"embedding": furnished(q, varies, summed)}
        (site,) = intercept(apply).report(tree, index).sites
        assert site.lowering == "rows dequantized"
        got, expected = jax.jit(intercept(apply))(tree, index), apply(qj.dequantize(tree), index)
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
        assert jnp.isnan(got[2, 0]).all()


def from_sites(case: Case, policy: str):
    """A quantized model, every parameter that a product sums over furnished."""
    found = sites(case.apply, case.params, case.x)
    q = jax.jit(functools.partial(qj.quantize, policy=policy, sites=found))(case.params)
    named, structure = jax.tree_util.tree_flatten_with_path(q, is_leaf=is_qtensor)
    by_path = {s.path: s for s in found if s.contracting}
    leaves = []
    for (_, leaf), name in zip(named, [row.path for row in qj.summary(q).rows], strict=True):
        if isinstance(leaf, QTensor) and name in by_path:
            site = by_path[name]
            summed, batch = (
                tuple(a + site.layers for a in axes) for axes in (site.contracting, site.batch)
            )
            varies = summed[:1] if "conv" in site.primitive else summed
            leaf = furnished(leaf, varies, summed, (*range(site.layers), *batch))
        leaves.append(leaf)
    return jax.tree.unflatten(structure, leaves)


MODELS = ("linen decoder", "plain stacked layers", "plain experts", "plain control flow")


@pytest.mark.parametrize("name", daily([*MODELS, "linen CNN"], ["linen decoder"]))
def test_models_run_on_them(name):
    """Scans over layers, experts, tied embeddings, loops."""
    case = CASES[name]()
    q = from_sites(case, "w8a8")
    floats = jax.jit(qj.dequantize)(q)
    expected = jax.jit(case.apply)(floats, case.x)
    run = jax.jit(intercept(case.apply, strict=True))
    for a, b in zip(*map(jax.tree.leaves, (run(q, case.x), expected)), strict=True):
        assert float(jnp.linalg.norm(a - b)) <= 0.05 * float(jnp.linalg.norm(b))


def test_the_gradient_of_the_input_is_that_of_the_values():
    """Straight through the rounding; of both terms."""
    w, x = normal(8, 6), normal(3, 8)
    full = furnished(qj.quantize({"w": w}, qj.Policy(otherwise="w8a8"))["w"], (0,), (0,))
    run = lambda x: jnp.sum(intercept(lambda p, x: x @ p["w"])({"w": full}, x))  # noqa: E731
    dx = jax.jit(jax.grad(run))(x)
    expected = jnp.broadcast_to(jnp.sum(qj.dequantize(full), 1), x.shape)
    np.testing.assert_allclose(dx, expected, rtol=1e-5, atol=1e-4)


def test_like_is_refused():
    w = {"w": normal(8, 6)}
    q = {"w": furnished(qj.quantize(w, qj.Policy(otherwise="w8"))["w"], (0,), (0,))}
    for refusing in (qj.quantize, qj.fake_quantize, prepare):
        with pytest.raises(ValueError, match="w: like= holds an input scale or low-rank factors"):
            refusing(w, like=q)
