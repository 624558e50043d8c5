"""Does HQQ move zero points as its paper says, and is a zero point between codes kept?"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax import affine
from quantjax.formats import IntFormat, Levels
from quantjax.ptq.hqq import hqq_array, hqq_scales, hqq_spec
from quantjax.spec import QuantSpec

SPEC = hqq_spec(QuantSpec(format=IntFormat(3), block=(8, 1)))


def sample(seed=0, shape=(24, 5)):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) + 0.4
    x[rng.random(shape) < 0.1] *= 3
    return jnp.asarray(x, jnp.float32)


def by_hand(group: np.ndarray, bits: int, p: float) -> tuple[float, float]:
    """The scale and zero point of one group of numbers, in float64."""
    low, high = min(group.min(), 0), max(group.max(), 0)
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    s = (high - low) / (qmax - qmin)
    z = qmin - np.round(low / s)
    v, beta, best = group / s, 10.0, (np.inf, z)
    for step in range(21):
        q = np.clip(np.round(v + z), qmin, qmax)
        e = v - (q - z)
        best = min(best, (np.sum(np.abs(e) ** p), z))
        if step == 20:
            break
        shrunk = [np.sign(a) * max(abs(a) - abs(a) ** (p - 1) / beta, 0) if a else 0 for a in e]
        z = np.clip(np.mean(q - v + shrunk), qmin, qmax)
        beta *= 1.01
    return s, best[1]


def test_it_is_the_iteration_by_hand():
    x = sample()
    got = hqq_scales(x, SPEC)
    for g, column in np.ndindex(3, 5):
        group = np.asarray(x, np.float64)[8 * g : 8 * g + 8, column]
        s, z = by_hand(group, 3, 0.7)
        np.testing.assert_allclose(got.scale[g, column], s, rtol=1e-6)
        # Steps of float32; a sum of 8 terms of some 4.
        np.testing.assert_allclose(got.zero_point[g, column], z, atol=2e-5)


@pytest.mark.parametrize("seed", range(5))
def test_its_norm_of_the_error_falls(seed):
    x = sample(seed, (64, 16))
    plain = qj.dequantize({"w": qj.quantize({"w": x}, qj.Policy([("w", SPEC)]))["w"]})["w"]
    found = affine.dequantize_array(hqq_array(x, SPEC))
    step = jnp.repeat(affine.find_scales(x, SPEC).scale, 8, 0)

    def norm(y):
        return float((jnp.abs((x - y) / step) ** 0.7).sum())

    assert norm(found) < 0.97 * norm(plain)


def test_a_fractional_zero_point_is_stored_to_the_bit(tmp_path):
    x = sample()
    q = hqq_array(x, SPEC)
    assert q.zero_point.dtype == jnp.float32 and (q.zero_point % 1 != 0).any()
    scales = affine.scales_of(q)
    snap = functools.partial(affine.fake_quantize_array, spec=SPEC)
    for fake in (snap, jax.jit(snap)):
        np.testing.assert_array_equal(fake(x, scales), affine.dequantize_array(q))
    again = affine.quantize_array(affine.dequantize_array(q), scales, spec=SPEC)
    np.testing.assert_array_equal(again.qvalue, q.qvalue)
    qj.save(tmp_path / "q.safetensors", {"w": q})
    jax.tree.map(
        np.testing.assert_array_equal, qj.load(tmp_path / "q.safetensors", like={"w": q}), {"w": q}
    )


@pytest.mark.parametrize("act", [None, "int8"])
def test_products_take_a_fractional_zero_point(act):
    """Weights alone, and beside activations in integers, where it takes floats and says why."""
    block, kernel = ((8, 1), sample()) if act is None else ((None, 1), sample())
    spec = hqq_spec(QuantSpec(format=IntFormat(4), block=block))
    if act:
        rows = QuantSpec(format=IntFormat(8), block=qj.Granularity.ROW)
        spec = QuantSpec(
            format=spec.format, block=block, symmetric=False, observer=spec.observer, act=rows
        )
    q = {"kernel": hqq_array(kernel, spec)}
    x = sample(3, (4, 24))

    def apply(params, x):
        return x @ params["kernel"]

    got = jax.jit(qj.intercept(apply))(q, x)
    want = x @ affine.dequantize_array(q["kernel"])
    if act:
        assert "zero point" in str(qj.intercept(apply).report(q, x))
        assert float(jnp.abs(got - want).max()) < 0.02 * float(jnp.abs(want).max())
    else:
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_half_levels_become_all_codes():
    spec = hqq_spec(qj.policy.preset_spec("w2g64"))
    assert spec.format == IntFormat(2, levels=Levels.FULL) and not spec.symmetric


@pytest.mark.parametrize("name", ["nf4", "mxfp4"])
def test_other_formats_are_refused(name):
    with pytest.raises(ValueError, match="kernel: HQQ needs integers"):
        params = {"kernel": jnp.ones((64, 2))}
        qj.calibrate(lambda p, x: x @ p["kernel"], params, [jnp.ones((1, 64))], qj.ptq.hqq(name))


def test_bad_norms_are_refused():
    with pytest.raises(ValueError, match="p must be in"):
        qj.ptq.hqq("w4", p=0)
