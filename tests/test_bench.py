"""Does the benchmark time what it says, and compare the right things?"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import (
    bench_candidates,
    bench_inference,
    bench_models,
    bench_sensitivity,
    bench_training,
    timing,
)
from experiments.bench_models import Case
from experiments.tables import inference_markdown, ratios_markdown

LIMITS = {"read_bytes_per_s": 1e10, "float32_ops_per_s": 1e11, "int8_ops_per_s": 4e11}


def tiny(**changes):
    params = {"kernel": jax.random.normal(jax.random.key(0), (64, 32))}
    x = jax.random.normal(jax.random.key(1), (4, 64))
    return Case("tiny", lambda p, x: x @ p["kernel"], params, (x,), **changes)


def test_rounds_are_interleaved_and_the_first_are_dropped():
    seen = []
    calls = {name: lambda name=name: seen.append(name) for name in "ab"}
    times = timing.interleaved(calls, 3, repeats={"b": 2})
    assert "".join(seen) == "aabbb" * 5
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}
    seen.clear()
    timing.interleaved(calls, 1, lead=False)
    assert "".join(seen) == "ab" * 3


def test_limits_are_those_of_this_machine():
    limits = timing.hardware_limits(1, size=2**16, side=64)
    assert set(limits) == set(LIMITS) and all(1e5 < v < 1e16 for v in limits.values())


def test_every_case_is_measured_in_full():
    rows = bench_inference.measure(tiny(), LIMITS, 0.0)
    base = rows[0]
    assert base["how"] == "float32" and base["times_float32"] == 1 and base["relative_error"] == 0
    by_name = {row["how"]: row for row in rows}
    assert set(bench_candidates.POLICIES) < set(by_name)
    w8 = by_name["w8a8"]
    assert w8["mb"] == (64 * 32 + 4 * 32) / 1e6 and 0 < w8["relative_error"] < 0.05
    assert w8["lowering"].startswith("1 x ")
    seconds = base["median_ms"] / 1e3
    assert base["share_of_ops"] == pytest.approx(2 * 4 * 64 * 32 / seconds / 1e11)
    assert base["share_of_bandwidth"] == pytest.approx(4 * 64 * 32 / seconds / 1e10)
    json.dumps(rows)


def test_from_memory_every_call_of_a_measurement_reads_a_copy_of_its_own(monkeypatch):
    size = 64 * 32 * 4
    monkeypatch.setattr(bench_candidates, "FROM_MEMORY", 3 * size)
    found = bench_candidates.candidates(tiny(from_memory=True))
    trees = found["float32"].trees
    assert len({tree["kernel"].unsafe_buffer_pointer() for tree in trees}) == 3
    # int8 is a quarter and has its scales: 12 copies would hold a little more than 3 sizes
    codes = [tree["kernel"].qvalue.unsafe_buffer_pointer() for tree in found["w8"].trees]
    assert len(set(codes)) == len(codes) == 12
    rows = bench_inference.measure(tiny(from_memory=True), LIMITS, 0.0)
    assert [(row["copies"], row["calls"]) for row in rows[:2]] == [(3, 3), (12, 12)]


def test_a_wrong_result_is_no_result(monkeypatch):
    wrong = lambda y, reference: 0.2  # noqa: E731
    monkeypatch.setattr(bench_inference, "relative_error", wrong)
    with pytest.raises(AssertionError, match="tiny: .* is 20.0% off float32"):
        bench_inference.measure(tiny(), LIMITS, 0.0)


def test_the_error_is_over_all_outputs_together():
    y = (jnp.array([3.0, 4.0]), [jnp.array([0.0])])
    z = (jnp.array([3.0, 4.0]), [jnp.array([0.5])])
    assert bench_inference.relative_error(z, y) == pytest.approx(0.1)


def test_compiling_is_timed_for_every_format():
    rows = bench_inference.compile_seconds(tiny(), rounds=1)
    assert rows[0]["times_as_long"] == 1 and all(row["median_s"] > 0 for row in rows)


@pytest.mark.full
def test_decoding_a_token_continues_the_prompt():
    """The logits after t tokens are those after t - 1 and, with their cache, one more."""
    width, vocabulary, layers = 32, 16, 2
    params = bench_models.transformer_params(width, vocabulary, layers)
    tokens = jax.random.randint(jax.random.key(2), (1, 7), 0, vocabulary)
    run, empty = jax.jit(bench_models.transformer), bench_models.empty_cache(width, layers)
    whole, found = run(params, tokens, empty)
    _, cache = run(params, tokens[:, :-1], empty)
    after, last = run(params, tokens[:, -1:], cache)
    # Float32 sums in another order, two layers of values of size one.
    np.testing.assert_allclose(after, whole, atol=1e-4)
    np.testing.assert_allclose(last[-1][0], found[-1][0][:, -1:], atol=1e-4)
    changed = tokens.at[0, 0].set((tokens[0, 0] + 1) % vocabulary)
    other, _ = run(params, changed, empty)
    assert np.abs(other - whole).max() > 1e-3


def test_the_table_shows_float_first_and_leaves_gaps():
    row = {"median_ms": 2.0, "share_of_ops": 0.25, "share_of_bandwidth": 0.1}
    payload = {
        "rows": [
            {"case": "a", "how": "float32", "times_float32": 1.0, **row},
            {"case": "a", "how": "w8", "times_float32": 2.5, **row},
            {"case": "b", "how": "float32", "times_float32": 1.0, **row},
            {"case": "b", "how": "Qwix w8", "times_float32": 0.1, **row, "share_of_ops": 0.02},
        ],
        "compile": [
            {"case": "b", "how": "float32", "median_s": 0.5, "times_as_long": 1.0},
            {"case": "b", "how": "w8", "median_s": 0.6, "times_as_long": 1.2},
        ],
    }
    columns, rows = inference_markdown(payload)
    assert columns == ("case", "float32", "w8", "Qwix w8")
    assert rows == [
        ("a", "2 ms (25%)", "2.50 (25%)", ""),
        ("b", "2 ms (25%)", "", "0.10 (10%)"),
        ("compiling the b", "0.50 s", "0.83", ""),
    ]


def test_every_kind_of_step_is_timed_beside_the_float_step_and_trains(monkeypatch):
    hows = {name: bench_training.HOWS[name] for name in ("float32", "w4a4, lsq")}
    monkeypatch.setattr(bench_training, "HOWS", hows)
    case = tiny()
    network = bench_training.Network(case.apply, case.params, case.args[0], jnp.arange(4), "kernel")
    rows = bench_training.measured("tiny", network, 1)
    assert [row["how"] for row in rows] == list(bench_training.HOWS)
    assert rows[0]["times_as_long"] == 1 and all(row["times_as_long"] > 0 for row in rows)
    columns, (line,) = ratios_markdown({"rows": rows})
    assert columns[2:] == tuple(bench_training.HOWS)[1:] and line[0] == "tiny"
    step = bench_training.stepper(network, bench_training.HOWS["w4a4, lsq"])
    losses = [float(step()) for _ in range(30)]
    assert losses[-1] < 0.9 * losses[0]


def test_a_report_is_timed_beside_a_calibration():
    case = tiny()
    small = bench_sensitivity.Case(case.apply, case.params, [case.args[0]] * 2, "kernel")
    rows = bench_sensitivity.measured("tiny", small, 1)
    assert [row["how"] for row in rows] == ["calibrate", "sensitivity"]
    assert rows[0]["times_as_long"] == 1 and rows[1]["times_as_long"] > 0
    assert ratios_markdown({"rows": rows})[0] == ("network", "calibrate", "sensitivity")


@pytest.mark.parametrize(
    ("ms", "cell"), [(60.24, "60.2 ms"), (999.4, "999 ms"), (16700.0, "16.7 s")]
)
def test_long_calls_are_in_seconds(ms, cell):
    rows = [{"network": "n", "how": how, "median_ms": ms, "times_as_long": 2.0} for how in "ab"]
    assert ratios_markdown({"rows": rows})[1] == [("n", cell, "2.00")]
