"""Does the report say what every leaf loses, and only against a reference that fits?"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import quantjax as qj
from quantjax.summary import summary
from tests.daily import daily

from .find import row

PRESETS = ["w8", "w4g64", "w2", "mxfp4", "nvfp4"]


def numpy_sqnr(x, xhat) -> float:
    x, xhat = np.asarray(x, np.float64), np.asarray(xhat, np.float64)
    return 10 * math.log10((x**2).sum() / ((x - xhat) ** 2).sum())


CASES = [*((name, jnp.float32) for name in PRESETS), ("w8", jnp.bfloat16)]


@pytest.mark.parametrize("case", daily(CASES, [CASES[1], CASES[-1]]))
def test_sqnr_is_that_of_numpy(case):
    name, dtype = case
    w = {"kernel": jax.random.normal(jax.random.key(1), (96, 24)).astype(dtype)}
    q = qj.quantize(w, name)
    want = numpy_sqnr(w["kernel"], qj.dequantize(q)["kernel"])
    # Relative error of a sum of 24 positive float32 terms: below 24 * 2^-24, in dB 4.4 times it.
    assert row(summary(q, reference=w), "kernel").sqnr_db == pytest.approx(want, abs=1e-4)


def test_sqnr_of_tiny_and_huge_values():
    x = jax.random.normal(jax.random.key(0), (64, 8))
    want = summary(qj.quantize({"kernel": x}, "w8"), reference={"kernel": x}).rows[0].sqnr_db
    for power in (-80, 80):  # squares would leave float32; powers of two change no digit
        w = {"kernel": x * np.float32(2.0**power)}
        got = summary(qj.quantize(w, "w8"), reference=w).rows[0].sqnr_db
        assert got == pytest.approx(want, abs=1e-4)


def test_sqnr_of_leaves_without_error_signal_or_number():
    w = {name: jnp.ones(4) for name in "abde"} | {"c": jnp.zeros(4), "n": jnp.arange(3)}
    now = w | {
        "b": w["b"].at[0].set(jnp.nan),
        "c": jnp.ones(4),
        "d": jnp.full(4, 0.9),
        "e": jnp.full(4, jnp.inf),
    }
    values = {row.path: row.sqnr_db for row in summary(now, reference=w).rows}
    assert values["a"] == math.inf
    assert math.isnan(values["b"])
    assert values["c"] == values["e"] == -math.inf
    assert values["d"] == pytest.approx(20, abs=1e-4)
    assert values["n"] is None
    text = str(summary(now, reference=w))
    assert "exact" in text and "nan" in text and "-inf" in text and "20.0" in text


def test_sqnr_is_exact_where_values_lie_on_the_grid():
    # Fused multiply-adds would leave (level * scale) - x at a rounding error of scale.
    x = qj.fake_quantize({"kernel": jax.random.normal(jax.random.key(0), (65, 7))}, "w8")
    assert summary(qj.quantize(x, "w8"), reference=x).rows[0].sqnr_db > 130
    q = qj.quantize(x, "w8")
    assert summary(q, reference=qj.dequantize(q)).rows[0].sqnr_db == math.inf


def test_sqnr_across_shardings():
    x = jax.random.normal(jax.random.key(0), (64, 16))
    w = {"kernel": jax.device_put(x, jax.devices()[0])}  # held to its device
    q = qj.quantize(w, "w8")
    want = summary(q, reference=w).rows[0].sqnr_db
    mesh = jax.make_mesh((8,), ("d",))
    spread = jax.device_put(w["kernel"], NamedSharding(mesh, PartitionSpec(None, "d")))
    elsewhere = jax.device_put(w["kernel"], jax.devices()[1])
    for reference in (spread, elsewhere, np.asarray(w["kernel"])):
        got = summary(q, reference={"kernel": reference}).rows[0].sqnr_db
        assert got == pytest.approx(want, abs=1e-4)
    got = summary(qj.quantize({"kernel": spread}, "w8"), reference=w).rows[0].sqnr_db
    assert got == pytest.approx(want, abs=1e-4)


def test_reference_of_other_paths_or_shapes_raises():
    w = {"a": {"kernel": jnp.ones((4, 4))}, "b": jnp.ones(3)}
    q = qj.quantize(w, "w8")
    with pytest.raises(ValueError, match=r"Only in the tree: \['b'\].*in the reference: \['c'\]"):
        summary(q, reference={"a": w["a"], "c": w["b"]})
    with pytest.raises(ValueError, match=r"a/kernel: shape \(4, 4\), in the reference \(4, 5\)"):
        summary(q, reference={"a": {"kernel": jnp.ones((4, 5))}, "b": w["b"]})
    with pytest.raises(ValueError, match=r"a/kernel: quantized \(int8\)"):
        summary(w, reference=q)
    with pytest.raises(ValueError, match="b: ArrayImpl, in the reference str"):
        summary(q, reference=w | {"b": "text"})
