"""Does the experiment train what its table says, in a moment, on short sequences?"""

import dataclasses
import functools
import json

import numpy as np
import pytest

import quantjax as qj
from experiments import qat_recurrent, sequences
from experiments.models import initialize
from experiments.post_training import Judge
from experiments.qat_plots import recurrent_figure
from experiments.qat_recurrent import FORMATS, Config, Recipe
from experiments.recurrent import RecurrentClassifier
from tests.daily import daily
from tests.test_sequences import write_vowels


@pytest.fixture
def config(tmp_path, monkeypatch):
    write_vowels(tmp_path)
    recipe = Recipe(epochs=1, more_epochs=1, batch_size=7)
    monkeypatch.setattr(qat_recurrent, "RECIPES", {"japanese_vowels": recipe})
    return Config(
        data_dir=tmp_path, networks=("japanese_vowels",), cells=("gru",), formats=("w4a8",),
        hidden=4, rates=(1e-2,), seeds=(0,), out=tmp_path / "runs",
    )  # fmt: skip


@pytest.mark.full
def test_a_row_is_a_training_in_its_bits(config):
    data = sequences.load("japanese_vowels", data_dir=config.data_dir)
    judge = Judge(RecurrentClassifier(2, "gru", 4), data, config.out)
    problem = qat_recurrent.Problem(judge, qat_recurrent.RECIPES["japanese_vowels"], seed=0)
    params = initialize(judge.model, data.train_images.shape[1:], seed=0)
    start = functools.cache(lambda: qat_recurrent.rounded(problem, params, "w2a2"))
    assert_bits(judge.model, start(), data.test_images, "w2a2")
    row = qat_recurrent.trained_row(problem, params, start, "w2a2", (1e-2,))
    assert row["validation_loss"] == row["rates"]["0.01"] and row["total"] == 6
    assert row["bits_per_weight"] < 32
    metrics = json.loads(next(config.out.rglob("metrics.json")).read_text())
    assert metrics["history"][-1]["validation_loss"] == row["validation_loss"]
    assert metrics["start"][0]["loss"] != row["validation_loss"]


@pytest.mark.full
def test_every_row_is_a_training_and_is_not_done_again(config, monkeypatch):
    path = config.out / "results" / "qat_recurrent.json"
    qat_recurrent.main(config)
    rows = json.loads(path.read_text())["rows"]
    assert not [row["reason"] for row in rows if "reason" in row]
    assert [(row["method"], row["format"]) for row in rows] == [
        ("float, as it was", "float32"), ("float", "float32"), ("rounded", "w4a8"), ("lsq", "w4a8")
    ]  # fmt: skip
    low = rows[-1]
    assert low["validation_loss"] == low["rates"]["0.01"]
    assert low["bits_per_weight"] < rows[1]["bits_per_weight"] == 32
    assert (config.out / "figures" / "qat_recurrent.png").stat().st_size > 1000

    # Rows that are lost come from the saved trainings, and no step is made again.
    path.unlink()
    monkeypatch.setattr("experiments.train._compile", lambda *_, **__: pytest.fail("trained again"))
    qat_recurrent.main(floats := dataclasses.replace(config, formats=()))
    again = json.loads(path.read_text())["rows"]
    assert [row["accuracy"] for row in again] == [row["accuracy"] for row in rows[:2]]
    # And rows that are there are not even evaluated.
    monkeypatch.setattr("experiments.post_training.evaluate", lambda *_: pytest.fail("seen again"))
    qat_recurrent.main(floats)


def assert_bits(model, tree, x, format):
    report = qj.intercept(model.apply).report(tree, x)
    gates = 4 if model.cell == "lstm" else 3
    assert len(report.sites) == 2 * gates + 1
    assert all(site.lowering.startswith("int8 product") for site in report.sites)
    kernels = {name: layer["kernel"] for name, layer in tree["params"]["cell"].items()}
    assert len(kernels) == 2 * gates
    weights, bits = FORMATS[format]
    for name, kernel in kernels.items():
        assert kernel.format == qj.preset(weights).otherwise.format
        assert kernel.act.format.bits == (bits if name.startswith("h") else 8)
    head = tree["params"]["head"]["kernel"]
    assert (head.format.bits, head.act.format.bits) == (8, 8)


@pytest.mark.parametrize("format", daily(FORMATS, ["w2a2"]))
@pytest.mark.parametrize("cell", daily(["lstm", "gru"], ["gru"]))
def test_inputs_and_states_of_every_gate_have_the_bits_of_the_row(cell, format):
    model = RecurrentClassifier(classes=2, cell=cell, hidden=4)
    params = initialize(model, (5, 4), seed=0)
    x = np.ones((2, 5, 4), np.float32)
    tree = qj.calibrate(model.apply, params, [x], qat_recurrent.policy(format))
    assert_bits(model, tree, x, format)


def test_calibration_sees_no_padding(config):
    data = sequences.load("japanese_vowels", data_dir=config.data_dir)
    lengths = data.train_images[..., -1].sum(1)
    found = qat_recurrent.calibration(data, seed=0)
    assert found.shape[1] == np.median(lengths) and (found[..., -1] == 1).all()
    assert len(found) == (lengths >= np.median(lengths)).sum()


def test_a_figure_is_drawn_of_rows_that_are_there(tmp_path):
    base = {"network": "n", "cell": "gru", "seed": 0}
    rows = [
        base | {"method": "float", "format": "float32", "accuracy": 0.9},
        base | {"method": "rounded", "format": "w4a8", "accuracy": 0.8},
        base | {"method": "lsq", "format": "w4a8", "reason": "stopped"},
    ]
    assert recurrent_figure(rows, tmp_path).stat().st_size > 1000
