"""Are the least weights masked, exactly as many as asked, and do they stay zeros as codes?"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import quantjax as qj
from quantjax import formats, prune, qat
from quantjax.affine import codes_of
from quantjax.spec import QuantSpec
from tests.daily import daily

HALF = qj.IntFormat(2, levels=qj.Levels.HALF)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {
    "a": {"kernel": normal(8, 6), "bias": normal(6, seed=1)},
    "b": {"kernel": 3 * normal(6, 4, seed=2)},
}


@settings(max_examples=8)
@given(
    sparsity=st.floats(0, 0.999), scope=st.sampled_from(["global", "layer"]), seed=st.integers(0, 9)
)
def test_the_least_go_and_as_many_as_asked(sparsity, scope, seed):
    """By sorting in NumPy; ties, as small whole numbers have many, change no count."""
    rng = np.random.default_rng(seed)
    w = {n: jnp.asarray(rng.integers(-3, 4, s), jnp.float32) for n, s in (("a", 7), ("b", (2, 3)))}
    masks = prune.magnitude(w, ["a", "b"], sparsity, scope)
    both = [(w[n].ravel(), masks[n].ravel()) for n in w]
    if scope == "global":
        both = [tuple(jnp.concatenate(x) for x in zip(*both, strict=True))]
    for x, mask in both:
        out = np.sort(np.abs(x))[: round(sparsity * x.size)]
        np.testing.assert_array_equal(np.sort(np.abs(x[~mask])), out)


def test_a_traced_sparsity_gives_the_same_masks():
    find = jax.jit(lambda w, s: prune.magnitude(w, "*/kernel", s))
    for sparsity in (0.0, 0.3, 0.9):
        jax.tree.map(
            np.testing.assert_array_equal,
            find(PARAMS, jnp.float32(sparsity)),
            prune.magnitude(PARAMS, "*/kernel", sparsity),
        )


def test_a_policy_names_what_it_quantizes_and_growing_masks_are_nested():
    policy, w, before = qj.preset("w4"), PARAMS, None
    for sparsity in (0.2, 0.5, 0.8):
        masks = prune.magnitude(w, policy, sparsity)
        assert masks["a"]["bias"] is None
        w = prune.apply(w, masks)
        if before is not None:
            assert all(
                map(lambda a, b: bool((a <= b).all()), *map(jax.tree.leaves, (masks, before)))
            )
        before = masks


def test_a_conv_net_is_pruned_by_rows_of_what_its_products_sum_over():
    """2:4 along the input channels of a convolution, the inputs of a product of several axes, and
    every layer of a scan, found by sites: no four in a row hold more than two."""

    def apply(p, x):
        x = lax.conv_general_dilated(
            x, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        y = jnp.einsum("nhwc,hwco->no", x, p["dense"])
        return lax.scan(lambda y, w: (jnp.tanh(w @ y), None), y.T, p["layers"])[0]

    w = {"conv": normal(3, 3, 4, 8), "dense": normal(2, 2, 8, 12), "layers": normal(2, 12, 12)}
    sites = qj.sites(apply, w, normal(5, 2, 2, 4))
    masks = prune.n_m(w, "*", sites=sites)
    rows = {
        "conv": np.moveaxis(masks["conv"], 2, -1),
        "dense": np.asarray(masks["dense"]).reshape(32, 12).T,
        "layers": np.asarray(masks["layers"]),  # w @ y sums over its last axis
    }
    for name, kept in rows.items():
        assert (kept.reshape(-1, 4).sum(1) == 2).all(), name
    x = np.abs(np.asarray(w["layers"])).reshape(-1, 4)
    np.testing.assert_array_equal(rows["layers"].reshape(-1, 4), x >= np.sort(x, 1)[:, [2]])


@pytest.mark.parametrize("name, shape, axis", [("kernel", (3, 3, 4, 5), 2), ("weight", (5, 4), 1)])
def test_names_tell_the_axis_without_sites(name, shape, axis):
    kept = prune.n_m({name: normal(*shape)}, name, 1, 4)[name]
    assert (kept.sum(axis) == 1).all()


def test_the_cubic_schedule_is_the_papers_and_takes_traced_steps():
    schedule = prune.Cubic(0.9, start=10, end=50, every=8, initial=0.1)
    traced = jax.jit(schedule)
    for step in range(0, 60, 3):
        t = np.clip((step - 10) // 8, 0, 5)
        want = 0.9 + (0.1 - 0.9) * (1 - t * 8 / 40) ** 3
        assert schedule(step) == pytest.approx(want, abs=1e-12)
        np.testing.assert_allclose(traced(step), want, atol=3e-7)  # a few roundings of float32


ZERO = {
    "int8": QuantSpec(format=qj.IntFormat(8)),
    "int4 full": QuantSpec(format=qj.IntFormat(4, levels=qj.Levels.FULL), group=4),
    "ternary": QuantSpec(format=formats.ternary, observer=qj.mse(steps=5)),
    "asymmetric": QuantSpec(format=qj.IntFormat(4), symmetric=False, observer=qj.minmax()),
    "unsigned": QuantSpec(
        format=qj.IntFormat(3, signed=False), symmetric=False, observer=qj.minmax()
    ),
    "nf4": QuantSpec(format=formats.nf4, group=4),
    "apot": QuantSpec(format=formats.apot(4)),
    "fp8": QuantSpec(format=formats.e4m3),
    "nvfp4": QuantSpec(format=formats.e2m1, group=4, scale_format=formats.e4m3),
    "mxfp4": QuantSpec(format=formats.e2m1, group=4, scale_format=formats.e8m0),
}


@pytest.mark.parametrize("name", daily(ZERO, ["asymmetric"]))
def test_zeros_stay_zeros_through_codes_training_leaves_and_files(name, tmp_path):
    """2:4 in every format with a zero: quantizing keeps it, `apply` then changes no bit; on codes
    of the whole weights it sets the code of zero and leaves the others; the file holds it all."""
    policy = qj.Policy([("*/kernel", ZERO[name])])
    masks = prune.n_m(PARAMS, "a/kernel")
    mask = np.asarray(masks["a"]["kernel"])
    pruned = prune.apply(PARAMS, masks)
    q = qj.quantize(pruned, policy)
    fake = qat.prepare(PARAMS, policy)
    trees = {"before": q, "after": prune.apply(qj.quantize(PARAMS, policy), masks)}
    trees["trained"] = qat.finalize(prune.apply(fake, masks))
    jax.tree.map(np.testing.assert_array_equal, prune.apply(q, masks), q)
    jax.tree.map(np.testing.assert_array_equal, trees["trained"], trees["after"])
    whole = codes_of(qj.quantize(PARAMS, policy)["a"]["kernel"])
    np.testing.assert_array_equal(
        np.asarray(codes_of(trees["after"]["a"]["kernel"]))[mask], whole[mask]
    )
    for label, tree in trees.items():
        qj.save(tmp_path / label, tree)
        stored = qj.load(tmp_path / label)
        jax.tree.map(np.testing.assert_array_equal, stored, tree)
        values = np.asarray(qj.dequantize(stored)["a"]["kernel"])
        assert not values[~mask].any() and values[mask].any()
        assert (values.T.reshape(-1, 4) != 0).sum(1).max() <= 2
    jax.tree.map(np.testing.assert_array_equal, jax.jit(prune.apply)(q, masks), q)


def test_masks_come_back_from_a_file(tmp_path):
    masks = prune.magnitude(PARAMS, "a/kernel", 0.5)
    qj.save(tmp_path / "masks", masks)
    again = qj.load(tmp_path / "masks")
    jax.tree.map(
        np.testing.assert_array_equal, prune.apply(PARAMS, again), prune.apply(PARAMS, masks)
    )


def test_no_gradient_reaches_a_pruned_weight():
    masks = prune.magnitude(PARAMS, "**/kernel", 0.5)

    def loss(p):
        return jnp.sum(prune.apply(qat.prepare(p, "w4"), masks)["a"]["kernel"].value ** 2)

    gradient = jax.jit(jax.grad(loss))(PARAMS)["a"]["kernel"]
    np.testing.assert_array_equal(gradient != 0, masks["a"]["kernel"])


def test_boxes_and_collections_are_kept():
    x = normal(3, 4)
    model = nn.Sequential([nn.Dense(4), nn.BatchNorm(True)])
    variables = jax.jit(model.init)(jax.random.key(0), x)
    masks = prune.n_m(variables, "layers_0/kernel")
    assert jax.tree.leaves(masks)[0].shape == (4, 4) and len(jax.tree.leaves(masks)) == 1
    assert jax.tree.structure(prune.apply(variables, masks)) == jax.tree.structure(variables)


def kernel(spec):
    return {
        "kernel": qj.quantize({"kernel": normal(4, 4)}, qj.Policy([("kernel", spec)]))["kernel"]
    }


@pytest.mark.parametrize(
    "spec, why",
    [
        (QuantSpec(format=HALF), r"kernel: .*int2h has none here: 0 lies between"),
        (QuantSpec(format=formats.binary), "binary has none"),
        (QuantSpec(format=qj.Codebook((-1.0, 0.5, 1.0))), "codebook has none"),
        (QuantSpec(format=qj.Codebook.learned(2)), "kmeans2 has none here: no learned level is 0"),
    ],
)
def test_a_mask_on_a_format_without_zero_raises(spec, why):
    masks = {"kernel": jnp.arange(16).reshape(4, 4) % 2 == 0}
    with pytest.raises(ValueError, match=why):
        prune.apply(kernel(spec), masks)
    with pytest.raises(ValueError, match=why):
        policy = qj.Policy([("kernel", spec)])
        prune.apply(qat.prepare({"kernel": normal(4, 4)}, policy), masks)


def test_zero_points_between_codes_and_low_rank_factors_raise():
    spec = QuantSpec(format=qj.IntFormat(4), symmetric=False)
    q = kernel(spec)["kernel"]
    masks = {"kernel": jnp.zeros((4, 4), bool)}
    replace = dataclasses.replace
    off = replace(q, zero_point=jnp.full(q.zero_point.shape, 0.5))
    with pytest.raises(ValueError, match="zero points lie between codes"):
        prune.apply({"kernel": off}, masks)
    far = replace(q, zero_point=jnp.full(q.zero_point.shape, 99, jnp.int8))
    with pytest.raises(ValueError, match="zero point lies beyond"):
        prune.apply({"kernel": far}, masks)
    low = replace(q, left=jnp.ones((4, 1, 1)), right=jnp.ones((1, 4, 1)))
    with pytest.raises(ValueError, match="low-rank factors are added"):
        prune.apply({"kernel": low}, masks)


def test_what_an_estimator_makes_of_zero_is_looked_at():
    masks = {"kernel": jnp.arange(16).reshape(4, 4) % 2 == 0}
    params = {"kernel": normal(4, 4)}
    tree = qat.prepare(params, "w4", estimator=qat.lsq())
    values = qj.dequantize(qat.finalize(prune.apply(tree, masks)))["kernel"]
    assert not np.asarray(values)[~np.asarray(masks["kernel"])].any()
    with pytest.raises(ValueError, match="its estimator makes of 0 is not known under jit"):
        jax.jit(prune.apply)(tree, masks)
    tree = qat.prepare(params, "binary", estimator=qat.ir_net())
    with pytest.raises(ValueError, match="kernel: a mask needs an exact zero"):
        prune.apply(tree, masks)


BAD = {
    "shape": (lambda w: prune.apply(w, {"a": {"kernel": jnp.ones((6, 8), bool)}}),
              r"a/kernel: expected a mask of shape \(8, 6\), got \(6, 8\)"),
    "shape of codes": (lambda w: prune.apply(qj.quantize(w, "w4"), {"a/kernel": jnp.ones(3, bool)}),
                       r"a/kernel: expected a mask of shape \(8, 6\)"),
    "no booleans": (lambda w: prune.apply(w, {"a": {"kernel": jnp.ones((8, 6))}}),
                    "a/kernel: expected a mask of booleans"),
    "nowhere": (lambda w: prune.apply(w, {"c": jnp.ones(3, bool)}), "c: a mask for a parameter"),
    "negative": (lambda w: prune.magnitude(w, "**", -0.1), r"\[0, 1\), got -0.1"),
    "all": (lambda w: prune.magnitude(w, "**", 1.0), r"\[0, 1\), got 1.0"),
    "scope": (lambda w: prune.magnitude(w, "**", 0.5, "row"), "scope"),
    "pattern": (lambda w: prune.magnitude(w, ["a/*", "c/*"], 0.5), "'c/\\*' matches no parameter"),
    "NaN": (lambda w: prune.magnitude({"a": jnp.array([jnp.nan])}, "a", 0.5), "a: holds NaN"),
    "whole numbers": (lambda w: prune.magnitude({"a": jnp.arange(3)}, "a", 0.5), "a: .* floats"),
    "quantized": (lambda w: prune.magnitude(qj.quantize(w, "w4"), "a/kernel", 0.5),
                  "a/kernel: is quantized already"),
    "policy of nothing": (lambda w: prune.magnitude(w, qj.Policy(), 0.5), "quantizes no parameter"),
    "does not divide": (lambda w: prune.n_m(w, "b/kernel"), "b/kernel: 2:4 does not divide the 6"),
    "n over m": (lambda w: prune.n_m(w, "**", 4, 4), "0 < n < m"),
    "no axis": (lambda w: prune.n_m(w, "a/bias"), "a/bias: neither its name nor its shape"),
    "end": (lambda w: prune.Cubic(0.5, end=3, start=3), "must come after"),
    "every": (lambda w: prune.Cubic(0.5, end=10, every=3), "must divide the 10 steps"),
    "final": (lambda w: prune.Cubic(1.0, end=3), "final must be a sparsity"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_raises(name):
    act, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        act(PARAMS)


def test_products_that_sum_over_different_axes_have_no_rows():
    sites = qj.sites(lambda p, x: x @ p["w"] @ p["w"].T, {"w": normal(4, 4)}, normal(2, 4))
    with pytest.raises(ValueError, match="w: its products sum over axes"):
        prune.n_m({"w": normal(4, 4)}, "w", sites=sites)
