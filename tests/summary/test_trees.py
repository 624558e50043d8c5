"""Is every tree reported: shapes, traced, stacked, boxed, with keys, text and functions?"""

import dataclasses
from functools import partial

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import quantjax as qj
from quantjax.summary import summary

from .find import row


def test_shapes_alone(variables):
    quantize = partial(qj.quantize, policy="nvfp4")
    shapes = summary(jax.eval_shape(quantize, variables), reference=variables, policy="nvfp4")
    full = summary(quantize(variables), policy="nvfp4")
    assert shapes.totals == full.totals
    assert all(row.sqnr_db is None and not row.nan_blocks for row in shapes.rows)
    assert row(shapes, "head/kernel").nan_blocks is None
    assert "SQNR" not in str(shapes) and "batch_stats" in str(shapes)


def test_traced_trees_report_shapes(variables):
    reports = []

    @jax.jit
    def traced(v):
        reports.append(summary(qj.quantize(v, "w4"), reference=v, policy="w4"))
        return 0

    traced(variables)
    assert reports[0].totals == summary(qj.quantize(variables, "w4")).totals
    assert "SQNR" not in str(reports[0])


def test_leaves_that_are_no_arrays_are_listed():
    tree = {"n": 3, "f": jnp.sin, "s": "x", "kernel": jnp.ones((2, 2)), "step": jnp.int32(1)}
    report = summary(qj.quantize(tree, "w8"), reference=tree)
    assert row(report, "n").note == "not an array: int"
    assert row(report, "s").note == "not an array: str"
    assert row(report, "f").note.startswith("not an array: ")
    assert row(report, "step").note == "int32, not a float"
    assert report.totals.bytes == 4 + 8 + 4
    with_policy = summary(qj.quantize(tree, "w8"), policy="w8")
    assert row(with_policy, "n").note == "not an array: int"
    q = qj.quantize({"kernel": tree["kernel"]}, "w8")
    named = summary(jax.tree.map(lambda a: "codes", q))
    assert named.rows[0].note == "not an array: QTensor of str"


def test_random_keys_and_empty_arrays():
    tree = {"key": jax.random.key(0), "none": None, "empty": jnp.ones((0, 3)), "f8": jnp.float32(1)}
    report = summary(tree, reference=tree, policy="w8")
    assert {row.path: row.bytes for row in report.rows} == {"key": 8, "empty": 0, "f8": 4}
    assert row(report, "empty").bits_per_weight is None
    str(report), report.to_html(), report.to_json()


def test_numpy_leaves():
    tree = {"kernel": np.ones((4, 2), np.float64), "b": np.float32(2)}
    assert summary(tree, reference=tree).totals.bytes == 64 + 4


def test_layer_stacked_tree():
    w = {"layers": {"kernel": jax.random.normal(jax.random.key(0), (12, 64, 16))}}
    spec = qj.QuantSpec(format=qj.IntFormat(4), group=32, stacked=1)
    q = qj.quantize(w, qj.Policy([("**", spec)]))
    stacked = summary(q, reference=w).rows[0]
    assert (stacked.granularity, stacked.block) == ("12 x group 32", (32, 1))
    one = jax.tree.map(lambda a: a[0], q)
    assert summary(one).rows[0].granularity == "group 32"
    assert summary(one).rows[0].bytes * 12 == stacked.bytes


def test_boxes_nnx_and_equinox():
    linear = eqx.nn.Linear(8, 4, key=jax.random.key(0))
    report = summary(qj.quantize(linear, "w8"), reference=linear, policy="w8")
    assert row(report, "weight").granularity == "per axis 0"
    state = nnx.state(nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
    assert row(summary(qj.quantize(state, "w8")), "kernel").quantized
    boxed = {"params": {"kernel": nn.Partitioned(jnp.ones((8, 4)), ("a", "b"))}}
    assert row(summary(qj.quantize(boxed, "w8"), reference=boxed), "kernel").granularity


def test_a_summary_is_a_value(variables):
    q = qj.quantize(variables, "w4")
    assert summary(q) == summary(q)
    assert hash(summary(q)) == hash(summary(q))
    with pytest.raises(dataclasses.FrozenInstanceError):
        summary(q).rows[0].path = "x"


def test_second_summary_compiles_nothing(variables, caplog):
    q = qj.quantize(variables, "w4")
    summary(q, reference=variables)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        summary(q, reference=variables)
    assert not [record for record in caplog.records if "ompil" in record.getMessage()]
