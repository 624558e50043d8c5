"""Is a ragged product in integers that of the rounded values, expert by expert?"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import quantjax as qj
from quantjax.affine import Scales
from quantjax.interpret import intercept
from quantjax.ops import fake_activation, quantized_ragged_dot
from tests.daily import daily, dealt

INT8, UINT8 = qj.IntFormat(8), qj.IntFormat(8, signed=False)
ACTS = {
    "rows": qj.QuantSpec(format=INT8),
    "tensor": qj.QuantSpec(format=qj.IntFormat(5), block=qj.Granularity.TENSOR),
    "unsigned": qj.QuantSpec(format=UINT8, symmetric=False, observer=qj.minmax()),
}
WEIGHTS = {
    "symmetric": qj.QuantSpec(format=INT8, block=(1, None, 1)),
    "one scale": qj.QuantSpec(format=qj.IntFormat(3), block=(None, None, None)),
    "half levels": qj.QuantSpec(format=qj.IntFormat(2, levels=qj.Levels.HALF), block=(1, None, 1)),
    "asymmetric": qj.QuantSpec(
        format=UINT8, block=(1, None, 1), symmetric=False, observer=qj.minmax()
    ),
}
SIZES = jnp.array([3, 0, 2], jnp.int32)  # an expert without tokens, and a token without an expert


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def experts(weight: str, act: str) -> qj.QTensor:
    spec = WEIGHTS[weight]
    policy = qj.Policy([("w", spec)])
    return qj.quantize({"w": normal(3, 16, 5, seed=1)}, policy)["w"]


@pytest.mark.parametrize(
    "weight, act",
    dealt(daily(WEIGHTS, ["half levels", "asymmetric"]), daily(ACTS, ["tensor", "unsigned"])),
)
def test_every_token_meets_its_expert(weight, act):
    """float32 rounds two scales, their product and the result: 4 of 2^-24; the reference rounds
    the values in its sum, 2 more on each term."""
    x, q, act = normal(6, 16), experts(weight, act), ACTS[act]
    rounded = np.asarray(fake_activation(x, act, None, (1,)), np.float64)
    w = np.asarray(qj.dequantize(q), np.float64)
    expert = [0, 0, 0, 2, 2]
    expected = np.stack([rounded[t] @ w[e] for t, e in enumerate(expert)] + [np.zeros(5)])
    size = np.stack([abs(rounded[t]) @ abs(w[e]) for t, e in enumerate(expert)] + [np.zeros(5)])
    got = jax.jit(quantized_ragged_dot, static_argnums=4)(x, q, SIZES, None, act)
    assert np.all(np.abs(got - expected) <= 8 * 2.0**-24 * size)


def test_the_model_gets_it_with_static_scales_and_gradients():
    act = ACTS["rows"]
    q, x = experts("symmetric", "rows"), normal(6, 16)
    q = qj.QTensor(q.qvalue, q.scale, format=q.format, block=q.block, act=act)
    apply = lambda p, x: lax.ragged_dot(x, p["w"], SIZES)  # noqa: E731
    (site,) = intercept(apply).report({"w": q}, x).sites
    assert site.lowering == "int8 product" and site.act == "int8"
    np.testing.assert_array_equal(
        intercept(apply)({"w": q}, x), quantized_ragged_dot(x, q, SIZES, None, act)
    )
    given = Scales(jnp.float32(1 / 60))
    loss = lambda x: quantized_ragged_dot(x, q, SIZES, given, act).sum()  # noqa: E731
    rounded = lambda x: apply({"w": qj.dequantize(q)}, fake_activation(x, act, given, (1,))).sum()  # noqa: E731
    np.testing.assert_allclose(jax.grad(loss)(x), jax.grad(rounded)(x), rtol=1e-6)
