"""Does the report say what every leaf is and weighs, and hide nothing?"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax.summary import summary
from quantjax.summary.measure import granularity
from tests.daily import daily

from .find import row

PRESETS = ["w8", "w4g64", "w2", "mxfp4", "nvfp4"]


def test_every_leaf_is_a_row_in_order(variables):
    q = qj.quantize(variables, "w8")
    assert [row.path for row in summary(q).rows] == [
        "batch_stats/norm/mean",
        "batch_stats/norm/var",
        "conv/bias",
        "conv/kernel",
        "head/bias",
        "head/kernel",
        "norm/bias",
        "norm/scale",
    ]


@pytest.mark.parametrize("name", daily(PRESETS, ["w4g64", "nvfp4"]))
def test_bytes_are_those_of_the_arrays(variables, name):
    q = qj.quantize(variables, name)
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(q))
    report = summary(q)
    assert report.totals.bytes == stored == sum(row.bytes for row in report.rows)
    assert row(report, "head/kernel").bytes == q["params"]["head"]["kernel"].nbytes


def test_bytes_count_zero_points_and_codebooks():
    x = jax.random.normal(jax.random.key(0), (64, 8))
    learned = qj.QuantSpec(format=qj.Codebook.learned(4))
    q = qj.quantize({"a": x, "b": x}, qj.Policy([("a", "w8"), ("b", learned)]))
    q["a"] = dataclasses.replace(q["a"], zero_point=jnp.zeros((1, 8), jnp.int8))
    report = summary(q)
    assert row(report, "a").bytes == 64 * 8 + 8 * 4 + 8
    assert row(report, "b").bytes == 64 * 8 // 2 + 8 * 4 + 16 * 4


def test_totals(variables):
    q = qj.quantize(variables, "w8")
    totals = summary(q).totals
    weights = (
        variables["params"]["conv"]["kernel"].size + variables["params"]["head"]["kernel"].size
    )
    parameters = sum(x.size for x in jax.tree.leaves(variables))
    assert (totals.leaves, totals.quantized_leaves, totals.parameters) == (8, 2, parameters)
    assert totals.float_bytes == 4 * parameters
    assert totals.kept_bytes == 4 * (parameters - weights)
    assert totals.ratio == totals.float_bytes / totals.bytes
    assert totals.bits_per_weight == 8 * totals.bytes / parameters


@pytest.mark.parametrize(
    "shape, block, words",
    [
        ((32, 16), (None, None), "per tensor"),
        ((32, 16), (None, 1), "per channel"),
        ((32, 16), (1, None), "per axis 0"),
        ((16, 8, 3, 3), (1, None, None, None), "per axis 0"),
        ((64, 16), (32, 1), "group 32"),
        ((64, 16), (64, 1), "per channel"),
        ((16, 64), (1, 32), "group 32, axis 1"),
        ((3, 3, 16, 8), (1, 3, 16, 1), "block 1x3x16x1"),
        ((12, 64, 16), (None, 1), "12 x per channel"),
        ((12, 64, 16), (32, 1), "12 x group 32"),
        ((2, 2), (1, 1), "per element"),
        ((64,), (None,), "per tensor"),
        ((64,), (16,), "group 16"),
    ],
)
def test_granularity(shape, block, words):
    assert granularity(shape, block) == words


def test_formats_of_scales_and_activations_are_shown():
    w = {"kernel": jax.random.normal(jax.random.key(0), (64, 8))}
    report = summary(qj.quantize(w, "nvfp4"))
    assert (report.rows[0].format, report.rows[0].scale) == ("e2m1", "e4m3")
    assert "e2m1 x e4m3" in str(report)
    assert "int4, act int8" in str(summary(qj.quantize(w, "w4a8")))


def test_what_stands_beside_the_codes_is_shown_and_counts():
    q = qj.quantize({"kernel": jax.random.normal(jax.random.key(0), (64, 8))}, "w8")["kernel"]
    scaled = dataclasses.replace(q, input_scale=jnp.ones((64, 1)))
    corrected = dataclasses.replace(q, left=jnp.ones((64, 1, 2)), right=jnp.ones((1, 8, 2)))
    report = summary({"a": scaled, "b": corrected})
    assert row(report, "a").input_scale and row(report, "b").rank == 2
    assert row(report, "a").bytes == 64 * 8 + 8 * 4 + 64 * 4
    assert row(report, "b").bytes == 64 * 8 + 8 * 4 + (64 + 8) * 2 * 4
    assert "int8 x inputs" in str(report) and "int8 + rank 2" in str(report)


def test_dtypes_that_differ_are_noted():
    w = {"a": jnp.ones((4, 4), jnp.bfloat16), "c": jnp.ones((4, 4)), "d": jnp.ones((4, 4))}
    text = str(summary(qj.quantize(w, "w8")))
    assert "reads as bfloat16: a" in text and "in float;" in text
    assert "in bfloat16;" in str(summary(qj.quantize({"a": w["a"]}, "w8")))


@pytest.mark.parametrize(
    "name", daily(["w8", "w4g16", "mxfp4", "nvfp4", "nf4g64"], ["w8", "mxfp4"])
)
def test_nan_scales_are_loud_after_jit(name):
    x = jax.random.normal(jax.random.key(0), (32, 16)).at[3, 5].set(jnp.nan)
    q = jax.jit(partial(qj.quantize, policy=name))({"head": {"kernel": x}})
    scale = q["head"]["kernel"].scale
    bad = int(np.isnan(np.asarray(qj.dequantize(scale))).sum())
    assert bad > 0
    report = summary(q)
    assert report.rows[0].nan_blocks == bad
    line = f"NaN scale in {bad} block{'s' * (bad > 1)}: head/kernel"
    assert any(warning.startswith(line) for warning in report.warnings)
    assert f"WARNING: {line}" in str(report)
    assert line in report.to_html() and line in report.to_json()


def test_zero_and_infinite_scales_are_loud():
    q = qj.quantize({"kernel": jnp.ones((4, 3))}, "w8")["kernel"]
    broken = dataclasses.replace(q, scale=q.scale.at[0, 0].set(0).at[0, 1].set(jnp.inf))
    assert summary({"kernel": broken}).warnings == (
        "infinite scale in 1 block: kernel (reads as infinity or NaN)",
        "zero scale in 1 block: kernel (reads as 0)",
    )
    assert summary({"kernel": q}).warnings == ()
