"""Does the report say which rule matched a leaf, and what the policy asked for but did not get?"""

import jax.numpy as jnp
import pytest

import quantjax as qj
from quantjax.summary import summary

from .find import row


def test_policy_says_what_matched_and_why_not(variables):
    policy = qj.Policy([("conv/*", None), ("head/kernel", "w4")], otherwise="w8")
    report = summary(qj.quantize(variables, policy), policy=policy)
    kernel, kept, spared = (row(report, p) for p in ("head/kernel", "conv/kernel", "head/bias"))
    assert (kernel.matched, kernel.note, kernel.quantized) == ("head/kernel", "", True)
    assert (kept.matched, kept.note, kept.quantized) == ("conv/*", "kept by the policy", False)
    assert spared.matched == "" and spared.note.startswith("a bias")
    assert summary(qj.quantize(variables, policy), policy=policy.resolve(variables)) == report


def test_assumed_axes_are_noted():
    w = {"query": {"kernel": jnp.ones((12, 64, 16))}, "odd": jnp.ones((8, 8))}
    report = summary(qj.quantize(w, "w8"), policy="w8")
    assert all("axes assumed" in row.note for row in report.rows)
    assert "Notes:\n  axes assumed" in str(report)


def test_what_the_policy_did_not_do_is_noted():
    w = {"a": {"kernel": jnp.ones((64, 4))}, "b": {"kernel": jnp.ones((64, 4))}}
    q = qj.quantize(w, "w8")
    mixed = {"a": q["a"], "b": w["b"]}
    other = summary(mixed, policy=qj.Policy([("a/kernel", None), ("b/kernel", "w4")]))
    assert "quantized, but the policy keeps it" in row(other, "a/kernel").note
    assert row(other, "b/kernel").note.startswith(
        "not quantized; the policy asks for QuantSpec(int4"
    )
    assert "asks for QuantSpec(int4" in row(summary(q, policy="w4"), "a/kernel").note
    assert row(summary(q, policy="w8g16"), "a/kernel").note == "the policy asks for group 16"
    assert row(summary(q, policy="w8a8"), "a/kernel").note.startswith("the policy asks for")
    assert row(summary(q, policy="w8"), "a/kernel").note == ""


def test_policy_errors_pass_through(variables):
    with pytest.raises(ValueError, match="no_such.*matches no parameter"):
        summary(variables, policy=qj.Policy([("no_such/*", "w8")]))
    with pytest.raises(ValueError, match="unknown preset"):
        summary(variables, policy="w99")
    with pytest.raises(ValueError, match="another tree"):
        summary({"kernel": jnp.ones((2, 2))}, policy=qj.preset("w8").resolve(variables))


def test_policy_notes_another_scale_format():
    tree = {"kernel": jnp.ones((32, 4))}
    (row,) = summary(qj.quantize(tree, "mxfp8"), policy="fp8").rows
    assert "the policy asks for" in row.note
    (row,) = summary(qj.quantize(tree, "mxfp8"), policy="mxfp8").rows
    assert row.note == ""
