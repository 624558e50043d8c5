"""Does the report say what every leaf is, weighs and loses, and hide nothing?"""

import dataclasses
import json
import math
import re
from functools import partial
from html.parser import HTMLParser

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import quantjax as qj
from quantjax.summary import Row, Summary, summary
from quantjax.summary.measure import granularity
from quantjax.summary.table import shorten

TITLES = ["path", "shape", "format", "block", "bytes", "bits"]
PRESETS = ["w8", "w4g64", "w2", "mxfp4", "nvfp4"]


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="conv")(x))
        x = nn.BatchNorm(use_running_average=True, name="norm")(x)
        return nn.Dense(10, name="head")(x.reshape(x.shape[0], -1))


@pytest.fixture(scope="module")
def variables():
    return CNN().init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


def row(report: Summary, path: str) -> Row:
    return next(row for row in report.rows if row.path == path)


def numpy_sqnr(x, xhat) -> float:
    x, xhat = np.asarray(x, np.float64), np.asarray(xhat, np.float64)
    return 10 * math.log10((x**2).sum() / ((x - xhat) ** 2).sum())


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


@pytest.mark.parametrize("name", PRESETS)
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
    "name, dtype", [*((name, jnp.float32) for name in PRESETS), ("w8", jnp.bfloat16)]
)
def test_sqnr_is_that_of_numpy(name, dtype):
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
    q = qj.quantize(w, "w4")
    want = summary(q, reference=w).rows[0].sqnr_db
    mesh = jax.make_mesh((8,), ("d",))
    spread = jax.device_put(w["kernel"], NamedSharding(mesh, PartitionSpec(None, "d")))
    elsewhere = jax.device_put(w["kernel"], jax.devices()[1])
    for reference in (spread, elsewhere, np.asarray(w["kernel"])):
        got = summary(q, reference={"kernel": reference}).rows[0].sqnr_db
        assert got == pytest.approx(want, abs=1e-4)
    got = summary(qj.quantize({"kernel": spread}, "w4"), reference=w).rows[0].sqnr_db
    assert got == pytest.approx(want, abs=1e-4)


def test_text_table(variables):
    text = str(summary(qj.quantize(variables, "w4"), reference=variables, policy="w4"))
    lines = text.splitlines()
    assert re.split("  +", lines[0]) == [*TITLES, "SQNR dB", "matched by"]
    cells = next(line for line in lines if line.startswith("head/kernel")).split()
    assert cells[:6] == ["head/kernel", "512x10", "int4", "per", "channel", "2,600"]
    assert cells[-1] == "w4"
    assert 18 < float(cells[-2]) < 25
    assert "2 of 8 leaves quantized" in text
    assert "a bias; name it in a rule to quantize it: conv/bias, head/bias, norm/bias" in text
    assert "collection batch_stats, not params" in text
    assert all(len(line) <= 100 for line in lines)
    # Columns are aligned: every row ends its bytes where the title does.
    end = lines[0].index("bytes") + len("bytes")
    assert all(line[end - 1].isdigit() and line[end] == " " for line in lines[2:10])
    assert repr(summary(variables)) == str(summary(variables))


def test_text_leaves_out_columns_that_say_nothing(variables):
    q = qj.quantize(variables, "w4")
    assert str(summary(q)).splitlines()[0].split() == TITLES


def test_text_of_nothing():
    assert "0 of 0 leaves quantized" in str(summary({}))
    assert "(root)" in str(summary(jnp.ones(3)))


def test_long_paths_are_shortened_and_stay_apart():
    tree = {
        "a_long_transformer_name": {
            f"decoder_layers_{i}": {
                "multi_head_self_attention": {
                    n: {"kernel": jnp.ones((2, 2))} for n in ("query_projection", "key_projection")
                }
            }
            for i in range(12)
        }
    }
    report = summary(qj.quantize(tree, "w8"), reference=tree, policy="w8")
    lines = str(report).splitlines()
    assert all(len(line) <= 100 for line in lines)
    paths = [line.split()[0] for line in lines[2:26]]
    assert len(set(paths)) == 24
    assert all(path.endswith("/kernel") for path in paths)


def test_paths_that_would_become_one_stay_whole():
    alike = ["abcdefgh/abcdefgh/x", "abcdefgh/abcdefgz/x"]
    assert shorten(alike, 5) == alike


def test_notes_on_numbered_paths_are_counted():
    tree = {f"layer_{i}": {"bias": jnp.ones(2)} for i in range(12)} | {"kernel": jnp.ones((2, 2))}
    report = summary(qj.quantize(tree, "w8"), policy="w8")
    assert "layer_*/bias (12)" in str(report)
    assert sum("a bias" in row.note for row in report.rows) == 12


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


def test_dtypes_that_differ_are_noted():
    w = {"a": jnp.ones((4, 4), jnp.bfloat16), "c": jnp.ones((4, 4)), "d": jnp.ones((4, 4))}
    text = str(summary(qj.quantize(w, "w8")))
    assert "reads as bfloat16: a" in text and "in float;" in text
    assert "in bfloat16;" in str(summary(qj.quantize({"a": w["a"]}, "w8")))


@pytest.mark.parametrize("name", ["w8", "w4g16", "mxfp4", "nvfp4", "nf4g64"])
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


class Page(HTMLParser):
    """Collects cells and checks that tags close in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.tags: set[str] = set()
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags.add(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def test_html_parses_and_is_escaped(variables):
    tree = variables | {"<b>": {"\"&'": jnp.ones(3)}}
    report = summary(qj.quantize(tree, "w4"), reference=tree, policy="w4")
    page = Page(report.to_html())
    assert not page.open
    assert page.tags == {"div", "table", "thead", "tbody", "tfoot", "tr", "td", "th", "p"}
    assert "<b>/\"&'" in page.cells and "head/kernel" in page.cells
    assert f"{report.totals.bytes:,}" in page.cells
    assert report._repr_html_() == report.to_html()


def test_json_round_trip(variables):
    q = qj.quantize(variables, "w4")
    report = summary(q, reference=variables, policy="w4")
    read = json.loads(report.to_json(), parse_constant=pytest.fail)
    assert read["totals"]["bytes"] == report.totals.bytes
    assert read["totals"]["ratio"] == report.totals.ratio
    assert len(read["rows"]) == len(report.rows)
    for got, want in zip(read["rows"], report.to_dict()["rows"], strict=True):
        sqnr = got.pop("sqnr_db")
        assert float(sqnr) == want.pop("sqnr_db")
        assert got == want
    assert read["rows"][3]["shape"] == [3, 3, 3, 8]
    assert read["rows"][3]["block"] == [None, None, None, 1]


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
