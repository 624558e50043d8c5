"""Do the tables of methods say what the rows say?"""

import numpy as np
import pytest

from experiments import method_tables

ROWS = [
    {"method": "m", "format": "w8", "seed": 0, "kl": 1.0, "embedding_8_bits": {"kl": 5.0}},
    {"method": "m", "format": "w8", "seed": 1, "kl": 3.0, "embedding_8_bits": {"kl": 5.0}},
    {"method": "n", "format": "w8", "reason": "not here"},
    {"method": "o", "format": "w8", "reason": "nor there"},
    {"method": "n", "format": "w4", "kl": 2.0, "embedding_8_bits": {"kl": 6.0}},
]


def test_cells_are_means_and_reasons_are_explained():
    table = method_tables.divergence({"rows": ROWS}, "kl", 1, embedding=False)
    assert table.columns == ("method", "w8", "w4")
    assert table.lines == [("n", "a", "2.0"), ("m", "2.0 ± 1.4", ""), ("o", "b", "")]
    assert table.notes == ["a, not here", "b, nor there"]
    assert table.markdown().endswith("No number: a, not here; b, nor there")
    table = method_tables.divergence({"rows": ROWS}, "kl", 1, embedding=True)
    assert table.lines[1][1] == "5.0"


def test_columns_and_lines_have_an_order():
    numbers = {"x": (0.1, 5.0, 0.2), "y": (0.2, 3.0, 0.3), "z": (0.3, None, 0.4)}
    rows = [
        {"method": name, "format": format, "kl": value}
        for name, values in numbers.items()
        for format, value in zip(("w4a8", "w2g64", "w8"), values, strict=True)
        if value is not None
    ]
    table = method_tables.methods_by_formats(rows, lambda row: row["kl"], digits=1)
    assert table.columns == ("method", "w8", "w2g64", "w4a8")
    assert [line[0] for line in table.lines] == ["x", "y", "z"]


def test_two_rows_of_one_seed_are_not_averaged():
    with pytest.raises(ValueError, match="more than one row.*'m', 'w8', 0"):
        method_tables.divergence({"rows": [*ROWS, ROWS[0]]}, "kl", 1, embedding=False)


def test_points_lost_are_against_the_float_network_of_the_same_name():
    rows = [
        {"method": "float", "format": "float32", "network": "a", "accuracy": 0.9},
        {"method": "float", "format": "float32", "network": "b", "accuracy": 0.5},
        {"method": "m", "format": "w8", "network": "b", "ends": "low", "accuracy": 0.4},
        {"method": "m", "format": "w8", "network": "b", "ends": "8 bits", "accuracy": 0.45},
    ]
    table = method_tables.lost({"rows": rows}, network="b", ends="low")
    assert table.lines == [("float32, accuracy 50.00 %", "0"), ("m", "10.00")]


def test_costs_are_medians_and_rows_without_them_do_not_count():
    costs = ((1.0, 2.0, 3e6), (2.0, 4.0, 5e6), (9.0, 9.0, 9e6))
    rows = [
        {"method": "m", "seconds": s, "cpu_seconds": c, "peak_bytes": p} for s, c, p in costs
    ] + [{"method": "m", "seconds": 100.0}, {"method": "n", "reason": "not here"}]
    assert method_tables.costs({"rows": rows}).lines == [("m", "2.0", "4.0", "5")]
    slower = {"method": "m", "seconds": 99.0, "cpu_seconds": 99.0, "device": "another"}
    assert method_tables.costs({"rows": [*rows, slower]}).lines == [("m", "2.0", "4.0", "5")]


def test_allocations_compare_the_ways_at_each_budget():
    rows = [
        {"network": "a", "budget": "w2", "method": way, "budget_bytes": 2000, "calibration": i,
         "test_accuracy": accuracy + i / 100, "measured": 0.5}
        for way, accuracy in (("uniform", 0.5), ("pairs", 0.6)) for i in range(2)
    ]  # fmt: skip
    table = method_tables.allocations({"rows": rows}, "a")
    assert table.columns == ("bytes of", "kB", "uniform, %", "pairs, %", "uniform, KL", "pairs, KL")
    cells = ("w2", "2.0", "50.50 ± 0.71", "60.50 ± 0.71", "5.00e-01", "5.00e-01")
    assert table.lines == [cells]


def test_predictions_are_compared_with_what_was_measured():
    rows = [
        {"network": "a", "measured": m, "predicted_layers": 2 * m**1.5, "predicted_pairs": p}
        for m, p in ((1e-4, 3.0), (1e-3, 1.0), (0.1, 2.0))
    ]
    failed = {"network": "a", "reason": "no allocation"}
    table = method_tables.predictions({"rows": [*rows, failed]})
    assert table.columns == ("network", "allocations", "layers", "pairs")
    want = np.corrcoef(np.log([1e-4, 1e-3, 0.1]), np.log([3.0, 1.0, 2.0]))[0, 1]
    assert table.lines == [("a", "3", "1.0000", f"{want:.4f}")]


def test_training_is_compared_with_float_networks_trained_as_long():
    def row(method, format, seed, accuracy, bits=32):
        key = {"network": "n", "method": method, "format": format, "activations": bits}
        return key | {"seed": seed, "accuracy": accuracy}

    tops = [row("float", "float32", seed, 0.9 + 0.01 * seed) for seed in (0, 1)]
    rows = [
        row("float, as it was", "float32", 0, 0.85),
        *tops,
        row("lsq", "w1", 0, 0.70),
        row("lsq", "ternary", 0, 0.80),
        row("lsq", "w2", 0, 0.88),
        row("lsq", "w2", 1, 0.87),
        row("lsq", "w2", 0, 0.10, bits=2),
        row("lsq", "w2", 2, 0.50),  # the float network of its seed is not there yet
        row("lsq", "w2", 0, 0.50) | {"network": "another"},
        {"network": "n", "method": "twn", "format": "w2", "activations": 32, "seed": 0}
        | {"reason": "undefined"},
    ]
    table = method_tables.trained({"rows": rows}, network="n", activations=32)
    assert table.columns == ("method", "w2", "ternary", "w1")
    assert table.lines == [
        ("float32 before, accuracy 85.00 %", "5.00", "", ""),
        ("float32, accuracy 90.50 ± 0.71 %", "0.00", "", ""),
        ("lsq", "3.00 ± 1.41", "10.00", "20.00"),
        ("twn", "a", "", ""),
    ]
    assert table.notes == ["a, undefined"]


def test_variants_of_a_method_have_lines_of_their_own():
    def row(accuracy, format="w2a2", **fields):
        key = {"network": "n", "method": "lsq", "format": format, "seed": 0, "accuracy": accuracy}
        return key | {"ends": "8 bits", "distil": False} | fields

    rows = [
        row(0.90, "float32", method="float", ends="", distil=False),
        row(0.80),
        row(0.89, "w1"),
        row(0.70, ends="low"),
        row(0.85, distil=True),
    ]
    table = method_tables.trained({"rows": rows}, network="n")
    assert table.columns == ("method", "w1", "w2a2")
    assert table.lines == [
        ("float32, accuracy 90.00 %", "0.00", ""),
        ("lsq", "1.00", "10.00"),
        ("lsq, all layers low", "", "20.00"),
        ("lsq, distilled", "", "5.00"),
    ]


def test_recurrent_networks_are_compared_with_the_float_one_of_their_cell():
    def row(cell, method, format, accuracy):
        key = {"network": "n", "cell": cell, "method": method, "format": format}
        return key | {"seed": 0, "accuracy": accuracy}

    rows = [
        row("lstm", "float", "float32", 0.9),
        row("lstm", "lsq", "ternary_a8", 0.7),
        row("lstm", "lsq", "w2a2", 0.8),
        row("lstm", "lsq", "w4a8", 0.9),
        row("lstm", "rounded", "w4a8", 0.8),
        row("gru", "float", "float32", 0.5),
        row("gru", "lsq", "w4a8", 0.4),
    ]
    table = method_tables.trained({"rows": rows}, network="n", cell="lstm")
    assert table.columns == ("method", "w4a8", "w2a2", "ternary_a8")
    head, *lines = table.lines
    assert head == ("float32, accuracy 90.00 %", "0.00", "", "")
    assert sorted(lines) == [("lsq", "0.00", "10.00", "20.00"), ("rounded", "10.00", "", "")]


def test_a_decoder_is_compared_in_nats_with_the_float_one_of_its_seed():
    def row(method, format, loss, seed=0):
        return {"table": "formats", "method": method, "format": format, "loss": loss, "seed": seed}

    state = {"table": "optimizer", "seed": 0}
    rows = [
        row("float", "float32", 1.5),
        row("float", "float32", 1.7, seed=1),
        row("lsq", "w4", 1.51),
        row("lsq", "w4", 1.73, seed=1),
        row("lsq", "w2", 1.9, seed=2),  # its float decoder is not there yet
        state | {"state_bits": 32, "state_bytes": 800, "loss": 1.5},
        state | {"state_bits": 8, "state_bytes": 202, "loss": 1.6},
    ]
    table = method_tables.decoder_formats({"rows": rows})
    assert table.columns == ("method", "w4")
    head, line = table.lines
    assert head[0].startswith("float32, 1.600 ± 0.141 nats") and line == ("lsq", "0.020 ± 0.014")
    table = method_tables.optimizer_states({"rows": rows})
    assert table.lines == [("32", "100.0", "1.5000"), ("8", "25.2", "1.6000")]


def test_ways_to_save_bytes_are_compared_at_the_same_bytes():
    def row(method, budget, distil, accuracy):
        key = {"network": "n", "method": method, "budget": budget, "distil": distil, "seed": 0}
        return key | {"accuracy": accuracy}

    rows = [
        row("float", 32, False, 0.9),
        row("quantize", 4, False, 0.89),
        row("quantize", 2, True, 0.88),
        row("prune", 4, False, 0.8),
    ]
    table = method_tables.compressions({"rows": rows}, "n")
    assert table.columns == ("method", "w4", "w2")
    head, *lines = table.lines
    assert head == ("float32, accuracy 90.00 %", "0.00", "")
    assert sorted(lines) == [
        ("prune", "10.00", ""),
        ("quantize", "1.00", ""),
        ("quantize, distilled", "", "2.00"),
    ]
