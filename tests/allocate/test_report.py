"""Is a planted bad layer found, and is it said what is wrong with it?"""

import dataclasses
import json
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax.allocate import Mode
from quantjax.allocate.figures import bars, curves, heat
from quantjax.allocate.weights import facts, rounded
from tests.daily import daily

from .networks import apply, inputs, mlp

INT4 = qj.QuantSpec(format=qj.IntFormat(4))
BLOCKS, WIDTH, INNER = 4, 16, 24


def residual(seed):
    """Blocks h + relu(h A + b) B between an input and an output layer."""
    rng = np.random.default_rng(seed)

    def draw(n, m, gain):
        return (gain * rng.normal(size=(n, m)) / np.sqrt(n)).astype(np.float32)

    params = {"in": {"kernel": draw(8, WIDTH, 1.4)}, "out": {"kernel": draw(WIDTH, 5, 1.4)}}
    for k in range(BLOCKS):
        params[f"block{k}"] = {
            "a": {"kernel": draw(WIDTH, INNER, 1.4), "bias": np.zeros(INNER, np.float32)},
            "b": {"kernel": draw(INNER, WIDTH, 0.7)},
        }
    return params


def run(params, x):
    h = x @ params["in"]["kernel"]
    for k in range(BLOCKS):
        block = params[f"block{k}"]
        h = h + jax.nn.relu(h @ block["a"]["kernel"] + block["a"]["bias"]) @ block["b"]["kernel"]
    return h @ params["out"]["kernel"]


def outliers(a, b, rng):
    """A few large weights, one in each column."""
    rows = rng.integers(0, len(b["kernel"]), b["kernel"].shape[1])
    b["kernel"][rows, np.arange(b["kernel"].shape[1])] *= 20


def spread(a, b, rng):
    """Input channels of very different sizes; the function stays as it is."""
    s = np.exp(rng.uniform(-4, 4, len(b["kernel"]))).astype(np.float32)
    a["kernel"] /= s
    b["kernel"] *= s[:, None]


def dead(a, b, rng):
    """Inputs that are never active, with large weights."""
    a["bias"][:2] = -1e4
    b["kernel"][:2] *= 30


def scaled(a, b, rng):
    """An output channel that nothing reads, much larger than those that share its scale."""
    b["kernel"][:, 0] *= 40


FAULTS = {
    outliers: "codes used|heavy tails|largest weight",
    spread: "input channel",
    dead: "2 outlier input channels of 24",
    scaled: "1 outlier output channel of 16",
    None: "% of its squared error is clipping",
}


@pytest.mark.parametrize("seed", daily(range(5), [0]))
@pytest.mark.parametrize("fault", daily(FAULTS, [outliers]))
def test_a_bad_layer_is_first_and_its_fault_is_named(fault, seed):
    rng = np.random.default_rng(50 + seed)
    params, bad = residual(seed), f"block{seed % BLOCKS}"
    policy = qj.Policy(otherwise=INT4)
    if fault is None:  # a range that cuts most of the weights off
        cut = qj.QuantSpec(format=qj.IntFormat(4), observer=qj.percentile(60))
        policy = qj.Policy([(f"{bad}/b/kernel", cut)], otherwise=INT4)
    else:
        fault(params[bad]["a"], params[bad]["b"], rng)
    if fault is scaled:
        tensor = dataclasses.replace(INT4, block=qj.Granularity.TENSOR)
        policy = qj.Policy(otherwise=tensor)
        for block in range(BLOCKS):
            params[f"block{block}"]["a"]["kernel"][0] = 0
        params["out"]["kernel"][0] = 0
    batches = inputs(seed, batches=8, size=8)
    report = qj.sensitivity(run, params, batches, {"int4": policy}, products=0)
    first = report.ranking("int4")[0]
    assert first.path == f"{bad}/b/kernel"
    words = " ".join(report.why(first, "int4"))
    assert any(part in words for part in FAULTS[fault].split("|")), words
    assert f"{bad}/b/kernel: " in report.to_text() and report.why(first, "int4")[0] in " ".join(
        str(report).split()
    )


def test_without_a_fault_nothing_is_blamed():
    report = qj.sensitivity(run, residual(0), inputs(size=8), {"int4": INT4}, products=0)
    for row in report.rows:
        words = " ".join(report.why(row, "int4"))
        for part in ("outlier", "dead", "clipping", "large", "heavy"):
            assert part not in words


def test_facts_of_a_matrix():
    w = np.ones((4, 6), np.float32)
    w[:, 1], w[2] = 8.0, 0.0
    found = facts(w, w.shape)
    assert (found.inputs.count, found.inputs.outliers, found.inputs.dead) == (6, 1, 0)
    assert (found.outputs.count, found.outputs.outliers, found.outputs.dead) == (4, 0, 1)
    assert found.inputs.spread == 8.0
    square, fourth = (w.astype(float) ** 2).mean(), (w.astype(float) ** 4).mean()
    np.testing.assert_allclose(found.kurtosis, fourth / square**2)
    normal = facts(np.random.default_rng(0).normal(size=(200, 200)).astype(np.float32), (200, 200))
    assert abs(normal.kurtosis - 3) < 0.15 and 1 < normal.peak < 1.6


def test_errors_are_split_in_clipping_and_rounding():
    # One scale of 1 for int3 (-3..3): 5 is clipped by 2, 0.25 and -0.25 are rounded.
    w = jnp.array([[5.0, 0.25, -0.25, 1.0]])
    spec = qj.QuantSpec(format=qj.IntFormat(3), block=(None, None))
    q = qj.quantize({"w": jnp.full((1, 4), 3.0)}, qj.Policy([("w", spec)]))
    (found,) = rounded(np.asarray(w), qj.quantize({"w": w}, like=q)["w"], 0)
    np.testing.assert_allclose(found.clipping, 4 / (4 + 2 * 0.0625))
    assert (found.used, found.levels) == (3, 4)  # 3, 0, 0, 1; four weights can not take seven
    np.testing.assert_allclose(found.sqnr_db, 10 * np.log10(26.125 / 4.125), rtol=1e-6)


def test_used_codes_are_counted_for_each_scale():
    w = np.array([[1.0, 1, -1, -1], [1, 0.5, 0, -1]], np.float32).T
    q = qj.quantize({"kernel": w}, "w3")["kernel"]
    (found,) = rounded(w, q, 0)
    assert found.used == (2 + 4) / 2


class Checker(HTMLParser):
    """Notes tags that are not closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "path", "circle", "rect") or tag == "circle":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag == "rect":  # those with a tip are closed, others close themselves
            return
        assert self.open.pop() == tag


@pytest.mark.parametrize("mode", daily(Mode, [Mode.FISHER]))
def test_text_json_and_page(mode):
    params = mlp(sizes=(16,) * 4)  # kernels of one shape, so that little is compiled
    params["<odd> & name"] = params.pop("dense1")

    def odd(p, x):
        return apply({"dense0": p["dense0"], "dense1": p["<odd> & name"], "dense2": p["dense2"]}, x)

    report = qj.sensitivity(odd, params, inputs(size=16), ["w2", "w8", None], mode=mode)
    data = json.loads(report.to_json())
    assert data["mode"] == mode.value and len(data["rows"]) == 3
    for row, stored in zip(report.rows, data["rows"], strict=True):
        assert stored["name"] == row.name
        assert [float(c["loss"]) for c in stored["cells"]] == [c.loss for c in row.cells]
    text = str(report)
    assert all(row.name in text for row in report.rows) and "w2: hurt most by" in text
    page = report.to_html()
    assert "<odd>" not in page and "&lt;odd&gt; &amp; name/kernel" in page
    assert "prefers-color-scheme:dark" in page
    for outside in ("http-equiv", "src=", "href=", "<script", "@import", "url("):
        assert outside not in page
    checker = Checker()
    checker.feed(page)
    assert not checker.open
    figures = sum(tag == "svg" for tag, _ in checker.tags)
    assert figures == (2 if mode is Mode.HESSIAN else 3)


def test_figures_of_extreme_numbers_are_finite():
    names = ["a" * 50, "b"]
    drawn = [
        curves(names, {"f": [0.0, 1e-30], "g": [-1.0, 1e3]}),
        curves(names, {"f": [0.0, -1.0]}),
        bars(names, {"f": [None, float("inf")], "g": [-3.0, 20.0]}, "dB"),
        heat(names, np.array([[1.0, -2.0], [0.0, 1.0]])),
    ]
    assert all("nan" not in d and "inf" not in d.replace("info", "") for d in drawn)


def test_an_unknown_format_raises():
    report = qj.sensitivity(apply, mlp(), inputs(), ["w8"], mode=Mode.HESSIAN, products=0)
    with pytest.raises(ValueError, match="'w5' is none of"):
        report.ranking("w5")


@pytest.mark.parametrize("mode", Mode)
def test_a_model_is_compiled_once_for_all_its_reports(mode):
    """With other parameters and batches it costs two traces for shapes, and no program."""
    traces = []

    def counted(params, x):
        traces.append(x.shape)
        return apply(params, x)

    def report(seed):
        batches = [inputs()[0] + seed]
        return qj.sensitivity(counted, mlp(seed), batches, ["w4", "w3"], mode=mode).to_json()

    first, count = report(0), len(traces)
    assert report(1) != first
    assert len(traces) - count == 2 < count
    assert report(0) == first
