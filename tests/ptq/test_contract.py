"""One table of methods, the same questions to each: a new method is a row.

Cells that are not daily run in the full suite; what a method refuses is written down."""

import functools
import re
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax import formats, ptq
from quantjax.formats import Codebook, ExponentFormat, IntFormat, Levels
from tests.daily import daily, dealt

METHODS: dict[str, Callable[[Any], Any]] = {
    "rtn": ptq.rtn,
    "rtn diagonal": functools.partial(ptq.rtn, correlations=False),
    "gptq": ptq.gptq,
    "gptq of the paper": functools.partial(ptq.gptq, candidates=1, rounds=0, paired=False),
    "hqq": ptq.hqq,
    "adaround": functools.partial(ptq.adaround, steps=20),
    "awq": ptq.awq,
}
# Whose outputs are never farther off, in the norm of H, than those of rounding to nearest.
NEVER_WORSE = ("rtn", "gptq", "gptq of the paper", "adaround")
FORMATS: dict[str, dict[str, Any]] = {
    "int8": dict(format=IntFormat(8)),
    "int4": dict(format=IntFormat(4), observer=qj.mse(steps=20)),
    "int4 group": dict(format=IntFormat(4), group=5),
    "int3 full": dict(format=IntFormat(3, levels=Levels.FULL)),
    "int2 half": dict(format=IntFormat(2, levels=Levels.HALF), observer=qj.mse(steps=20)),
    "binary": dict(format=formats.binary),
    "uint4 asymmetric": dict(
        format=IntFormat(4, signed=False), symmetric=False, observer=qj.minmax(), group=6
    ),
    "tensor": dict(format=IntFormat(3), block=qj.Granularity.TENSOR),
    "nf4": dict(format=formats.nf4, group=6),
    "kmeans3": dict(format=Codebook.learned(3)),
    "e4m3": dict(format=formats.e4m3),
    "mxfp4": dict(format=formats.e2m1, group=4, scale_format=ExponentFormat()),
    "nvfp4": dict(format=formats.e2m1, group=4, scale_format=formats.e4m3),
}
REFUSED = {  # (method, format): what the error says
    **{("hqq", f): "HQQ needs integers" for f in ("nf4", "kmeans3", "e4m3", "mxfp4", "nvfp4")},
}
CELLS = [
    pytest.param(m, f, id=f"{m}-{f}", marks=[] if (i + 2 * j) % 28 == 0 else pytest.mark.full)
    for i, m in enumerate(METHODS)
    for j, f in enumerate(FORMATS)
]
each_method = pytest.mark.parametrize("name", METHODS)
most_used = pytest.mark.parametrize("name", daily(METHODS, ["gptq"]))


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def inputs(*shape: int, seed: int = 9) -> jax.Array:
    """Correlated along the last axis."""
    return normal(*shape, seed=seed) + 2 * normal(*shape[:-1], 1, seed=seed + 1)


def policy(**spec: Any) -> qj.Policy:
    return qj.Policy([("**/kernel", qj.QuantSpec(**spec))])


W3 = policy(format=IntFormat(3), observer=qj.mse(steps=20))


def run(name: str, apply: Any, params: Any, batches: Any, policy: Any = W3) -> Any:
    return qj.calibrate(apply, params, batches, METHODS[name](policy))


def values(tree: Any) -> Any:
    return jax.tree.leaves(qj.dequantize(tree))


def dense(params: Any, x: Any) -> Any:
    return x @ params["a"]["kernel"] + params["a"]["bias"]


DENSE = {"a": {"kernel": normal(12, 6), "bias": normal(6, seed=1)}}
X = inputs(64, 12)


@pytest.mark.parametrize("name, fmt", CELLS)
def test_every_format(name, fmt):
    """Stored in the policy's bits, finite, other leaves the very same; and what it is for."""
    rules = policy(**FORMATS[fmt])
    if why := REFUSED.get((name, fmt)):
        with pytest.raises(ValueError, match=f"a/kernel: {why}"):
            run(name, dense, DENSE, [X], rules)
        return
    got = run(name, dense, DENSE, [X[:32], X[32:]], rules)
    assert got["a"]["bias"] is DENSE["a"]["bias"]
    q, w = got["a"]["kernel"], DENSE["a"]["kernel"]
    assert q.format.bits == FORMATS[fmt]["format"].bits and q.shape == w.shape
    assert q.dtype == w.dtype and np.isfinite(qj.dequantize(got)["a"]["kernel"]).all()
    if name in NEVER_WORSE:
        nearest = qj.quantize(DENSE, rules)
        want = np.asarray(dense(DENSE, X), np.float64)
        ours, plain = (
            ((np.asarray(dense(qj.dequantize(t), X)) - want) ** 2).sum() for t in (got, nearest)
        )
        assert ours <= plain * (1 + 1e-4)


@most_used
def test_bfloat16_is_kept_and_summed_in_float32(name):
    low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), DENSE)
    x = X.astype(jnp.bfloat16)
    got = run(name, dense, low, [x])
    assert got["a"]["kernel"].dtype == jnp.bfloat16
    # The moments are of the same numbers in float32, so the weights are too.
    same = jax.tree.map(lambda a: a.astype(jnp.float32), low)
    wide = run(name, dense, same, [x.astype(jnp.float32)])
    a, b = (np.asarray(qj.dequantize(t)["a"]["kernel"], np.float32) for t in (got, wide))
    np.testing.assert_allclose(a, b, rtol=2**-8)


@most_used
def test_a_second_call_compiles_nothing(name):
    seen: list[str] = []
    listener = lambda event, seconds, **more: seen.append(event)  # noqa: E731
    run(name, dense, DENSE, [X])
    other, x = jax.tree.map(lambda a: a + 1, DENSE), X * 2
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        run(name, dense, other, [x])
        again = [e for e in seen if "backend_compile" in e]
        jax.jit(lambda x: x * 3 + len(seen))(X)  # the listener hears of what is compiled
        assert len([e for e in seen if "backend_compile" in e]) > len(again)
    finally:
        jax.monitoring.clear_event_listeners()
    assert not again


@most_used
def test_odd_weights_are_finite(name):
    params = {
        "zero": {"kernel": jnp.zeros((4, 3))},
        "constant": {"kernel": jnp.full((3, 1), 0.3)},
        "last": {"kernel": jnp.full((1, 1), -2.0)},
    }

    def apply(p, x):
        for layer in ("zero", "constant", "last"):
            x = x @ p[layer]["kernel"] + 1
        return x

    got = run(name, apply, params, [inputs(8, 4)])
    for leaf in values(got):
        assert np.isfinite(leaf).all()
    np.testing.assert_array_equal(qj.dequantize(got)["zero"]["kernel"], 0)
    # One weight alone is the end of its range; rounding has nothing to lose there.
    np.testing.assert_allclose(qj.dequantize(got)["last"]["kernel"], -2, rtol=1e-4)


BATCHES = {
    "one sample": inputs(1, 12),
    "constant features": jnp.ones((16, 12)),
    "one input never seen": inputs(16, 12).at[:, 3].set(0),
    "tiny": inputs(16, 12) * 1e-18,
    "huge": inputs(16, 12) * 1e17,
}


@pytest.mark.parametrize(
    "name, case",
    dealt(
        daily(METHODS, ["rtn", "gptq", "adaround", "awq"]),
        daily(BATCHES, ["one sample", "one input never seen", "tiny", "huge"]),
    ),
)
def test_odd_activations_are_finite(name, case):
    got = run(name, dense, DENSE, [BATCHES[case]])
    for leaf in values(got):
        assert np.isfinite(leaf).all()


@pytest.mark.parametrize("name, bad", dealt(METHODS, [np.nan, np.inf]))
def test_activations_that_are_not_finite_are_named(name, bad):
    if name == "hqq":
        pytest.skip("looks at no activation")
    with pytest.raises(ValueError, match="a/kernel: batch 1: .*NaN or infinity"):
        run(name, dense, DENSE, [X, X.at[5, 2].set(bad)])


def near(got: Any, want: Any) -> None:
    """The same to the rounding of sums in another order; no weight here lies near a tie."""
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@most_used
def test_stacked_layers_are_as_layers_apart(name):
    w, x = normal(3, 6, 6) / 2, inputs(32, 6)

    def scanned(p, x):
        return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["kernel"])[0]

    def looped(p, x):
        for layer in p:
            x = jnp.tanh(x @ layer["kernel"])
        return x

    spec = qj.QuantSpec(format=IntFormat(3), observer=qj.mse(steps=20), stacked=1)
    got = run(name, scanned, {"kernel": w}, [x], qj.Policy([("kernel", spec)]))
    want = run(name, looped, [{"kernel": a} for a in w], [x])
    near(jnp.stack([p["kernel"] for p in qj.dequantize(want)]), qj.dequantize(got)["kernel"])


@pytest.mark.full
@most_used
def test_experts_are_as_each_alone(name):
    w, x = normal(3, 8, 5), jnp.stack([inputs(32, 8, seed=s) for s in range(3)])

    def experts(p, x):
        return jnp.einsum("eti,eio->eto", x, p["kernel"])

    got = run(name, experts, {"kernel": w}, [x])
    for e in range(3):
        alone = run(name, lambda p, x: x @ p["kernel"], {"kernel": w[e]}, [x[e]])
        near(qj.dequantize(got)["kernel"][e], qj.dequantize(alone)["kernel"])


@most_used
def test_an_expert_that_is_never_reached_is_rounded(name):
    """Rows of zeros are what a router leaves to it."""
    w, x = normal(2, 8, 5), jnp.stack([inputs(32, 8), jnp.zeros((32, 8))])

    def experts(p, x):
        return jnp.einsum("eti,eio->eto", x, p["kernel"])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zeros are samples too; a method may say more
        got = run(name, experts, {"kernel": w}, [x])
    unseen = np.asarray(qj.dequantize(got)["kernel"][1])
    assert np.isfinite(unseen).all()
    assert np.linalg.norm(unseen - w[1]) < 0.5 * np.linalg.norm(w[1])


def convolved(groups: int) -> Callable[[Any, Any], Any]:
    def apply(p, x):
        return jax.lax.conv_general_dilated(
            x, p["kernel"], (1, 1), "SAME", feature_group_count=groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    return apply


@pytest.mark.full
@most_used
def test_groups_of_a_convolution_are_as_each_alone(name):
    if name == "awq":
        pytest.skip("takes one exponent for the whole kernel")
    w, x = normal(3, 3, 2, 6), inputs(2, 5, 5, 4)
    got = run(name, convolved(2), {"kernel": w}, [x])
    for g in range(2):
        part = {"kernel": w[..., 3 * g : 3 * g + 3]}
        alone = run(name, convolved(1), part, [x[..., 2 * g : 2 * g + 2]])
        near(qj.dequantize(got)["kernel"][..., 3 * g : 3 * g + 3], qj.dequantize(alone)["kernel"])


@most_used
def test_leaves_that_no_rule_matches_are_untouched(name):
    params = {"a": DENSE["a"], "b": {"kernel": normal(6, 2)}}

    def apply(p, x):
        return jnp.tanh(dense(p, x)) @ p["b"]["kernel"]

    got = run(name, apply, params, [X], qj.Policy([("a/kernel", "w4")]))
    assert got["b"]["kernel"] is params["b"]["kernel"] and isinstance(
        got["a"]["kernel"], qj.QTensor
    )


@each_method
def test_what_is_quantized_already_is_refused(name):
    tree = qj.quantize(DENSE, W3)
    with pytest.raises(ValueError, match=re.escape("a/kernel")):
        run(name, dense, tree, [X])
