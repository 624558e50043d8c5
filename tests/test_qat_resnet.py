"""Does a residual network train in the bits that its row says, from the float one, to what is
judged?"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from experiments import qat_resnet
from experiments.models import initialize
from experiments.post_training import Judge, seen
from experiments.qat_plots import residual_figure
from experiments.qat_resnet import FLOAT, LAYERS, RECIPES, Cell, Config, Problem
from experiments.resnet import ResNet
from experiments.rows import Rows
from experiments.train import TrainResult
from experiments.ways import WAYS, parts
from quantjax import formats
from quantjax.paths import named_leaves
from tests.daily import daily
from tests.tiny_run import make_larger_data

TINY = ResNet(blocks=1, classes=3, channels=(2,), projection=True)
PROJECTED = TINY.clone(channels=(2, 4))
CASES = [
    (TINY, Cell("lsq", "w2a2", "8 bits", True)),
    (TINY, Cell("lsq", "w1", "8 bits")),
    (PROJECTED, Cell("lsq", "w3a3", "low")),
    (PROJECTED, Cell("n2uq", "w2a2", "low")),
    (PROJECTED, Cell("apot", "w4a4", "low")),
]


@pytest.fixture
def problem(tmp_path, monkeypatch):
    """Of sixteen images for calibration, in place of a thousand."""
    config = Config(tmp_path, rates=(0.02,), epochs=1, more_epochs=1, batch_size=16, out=tmp_path)
    data = make_larger_data()
    images = data.normalize(data.train_images[:16])
    monkeypatch.setattr(qat_resnet, "batches", lambda judge, seed: [images])
    return Problem(Judge(TINY, data, tmp_path), config, "resnet8", 0)


def test_resnet8_has_the_parameters_of_mlperf_tiny():
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(RECIPES["resnet8"].model.init, jax.random.key(0), image)
    # It gives every convolution a bias, seven before a norm and two beside one.
    biases = 3 * 16 + 2 * 32 + 2 * 64 + 32 + 64
    assert sum(x.size for x in jax.tree.leaves(variables)) == 78_666 - biases
    kernels = [x for x in jax.tree.leaves(variables["params"]) if x.ndim > 1]
    assert len(kernels) == 8 + 2


@pytest.mark.parametrize("case", daily(CASES, CASES[:1]), ids=lambda case: "_".join(case[1][:3]))
def test_a_cell_trains_its_bits_and_is_judged_as_it_is_stored(problem, case):
    model, cell = case
    problem = problem._replace(judge=dataclasses.replace(problem.judge, model=model))
    params = initialize(model, (8, 8, 1), seed=0)
    result = problem.more(params, cell)(0.02)
    tree = qj.qat.finalize(result.params)
    kernels = {
        n.removesuffix("/kernel"): q for n, q in named_leaves(tree)[0] if n.endswith("/kernel")
    }
    weights, bits = qat_resnet.bits_of(cell.format)
    few, ends = int(weights[1]), int(weights[1]) if cell.ends == "low" else 8
    between = kernels.keys() - {"conv1", "linear"}
    assert ("layer2_0/shortcut" in between) == (model is PROJECTED)
    assert {kernels[name].format.bits for name in between} == {few}
    assert [kernels[name].format.bits for name in ("conv1", "linear")] == 2 * [ends]
    acts = {name: q.act and q.act.format for name, q in kernels.items()}
    if bits == 32:
        assert set(acts.values()) == {None}
    else:
        grid = WAYS[cell.method].grid(bits)
        assert acts["conv1"] == qj.IntFormat(8) and {acts[n] for n in between} == {grid}
        assert acts["linear"] == (grid if cell.ends == "low" else qj.IntFormat(8, signed=False))
    moved = result.params["batch_stats"]["bn1"]["mean"] - params["batch_stats"]["bn1"]["mean"]
    assert np.all(moved != 0)
    # A tie may fall the other way in integers.
    judged, last = problem.judge.validation(seen(tree)), result.history[-1].validation_accuracy
    assert judged == pytest.approx(last, abs=0.11)


def test_with_all_layers_low_the_image_keeps_eight_bits():
    between, first = parts(LAYERS, WAYS["apot"], "w3", 2, low=True)
    assert [spec.format for _, spec in first.policy.rules] == [formats.apot(3)]
    assert [spec.act.format for _, spec in first.policy.rules] == [qj.IntFormat(8)]
    # Powers of two have no rule for a signed image.
    assert first.estimator.activations == qj.qat.lsq().activations
    assert [name for name, _ in between.policy.rules] == ["layer*_*/*/kernel", "linear/kernel"]
    assert {s.act.format for _, s in between.policy.rules} == {formats.apot(2, signed=False)}


@pytest.mark.parametrize("name", ["w4x4", "a4", "ternarya8"])
def test_other_formats_are_refused(name):
    with pytest.raises(ValueError, match=f"format '{name}': expected bits as in 'w4a4'"):
        qat_resnet.bits_of(name)


def test_rows_of_other_epochs_are_not_mixed(problem, tmp_path):
    rows = Rows(tmp_path / "rows.json", {})
    key = {"network": "resnet8", "epochs": 1, "more_epochs": 7}
    rows.row(key, lambda: {"accuracy": 0.5})
    with pytest.raises(ValueError, match="rows of resnet8 have .*7}, asked: .*'more_epochs': 1}"):
        qat_resnet.network_rows(rows, problem.config, "resnet8")


def test_rows_of_a_network_that_was_trained_anew_are_not_mixed(problem, monkeypatch):
    monkeypatch.setattr(qat_resnet, "load", lambda name, data_dir: problem.judge.data)
    rows = Rows(problem.config.out / "rows.json", {})
    base = {"network": "resnet8", "epochs": 1, "more_epochs": 1, "seed": 0}
    key = FLOAT._replace(method="float, as it was")._asdict() | base
    rows.of_network(key, {"w": np.ones(2)}, lambda: {"accuracy": 0.5})
    again = TrainResult({"w": np.zeros(2)}, None, (), ())
    monkeypatch.setattr(Problem, "float_network", lambda self: again)
    with pytest.raises(ValueError, match="are of other parameters"):
        qat_resnet.network_rows(rows, problem.config, "resnet8")


@pytest.mark.full
def test_a_table_is_computed_and_not_computed_again(problem, monkeypatch, capfd):
    monkeypatch.setattr(qat_resnet, "load", lambda name, data_dir: problem.judge.data)
    monkeypatch.setitem(RECIPES, "resnet8", RECIPES["resnet8"]._replace(model=TINY))
    config = dataclasses.replace(problem.config, formats=("w2a2",))
    qat_resnet.main(config)
    rows = Rows(config.out / "results" / "qat_resnet.json", {}).stored()
    assert [row["method"] for row in rows] == ["float, as it was", "float", "lsq"]
    assert all(0 <= row["accuracy"] <= 1 and row["seconds"] > 0 for row in rows)
    assert [row.get("rates") for row in rows] == [
        None, *({"0.02": row["validation_accuracy"]} for row in rows[1:])
    ]  # fmt: skip
    monkeypatch.setattr(qat_resnet, "train", None)
    qat_resnet.main(config)
    assert "resnet8.png" in capfd.readouterr().out


def test_a_figure_is_drawn(tmp_path):
    base = {"network": "n", "seed": 0, "distil": False}
    rows = [
        base | FLOAT._asdict() | {"accuracy": 0.9},
        base | {"method": "lsq", "format": "w2a2", "ends": "low", "accuracy": 0.8},
        base | {"method": "lsq", "format": "w1", "ends": "8 bits", "accuracy": 0.7},
    ]
    assert residual_figure(rows, "n", tmp_path).stat().st_size > 1000
