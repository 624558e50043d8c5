"""Does the experiment on activations quantize what each row says, and add up the rows?"""

from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest

import quantjax as qj
from experiments import activations
from experiments.data import Dataset
from experiments.post_training import Judge
from experiments.tables import activations_markdown
from tests.daily import daily


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        return nn.Dense(3)(x.reshape(len(x), -1))


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr(activations, "IMAGES", 32)
    monkeypatch.setattr(activations, "BATCH", 16)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (100, 4, 4, 1), dtype=np.uint8)
    labels = random.integers(0, 3, len(images)).astype(np.int32)
    parts = (images, labels) * 3
    data = Dataset("random", 3, *parts, (0.5,), (0.3,))
    judge = Judge(Network(), data, tmp_path_factory.mktemp("scratch"))
    return judge, jax.jit(Network().init)(jax.random.key(0), data.normalize(images[:1]))


# Each kind of activation once.
CORE = [("w8a8", "dynamic"), ("w8a4", "static, asymmetric"), ("fp8", "static")]


@pytest.mark.parametrize("row", daily(activations.ROWS, CORE), ids=", ".join)
def test_every_row_runs_and_is_near_the_float_network(trained, row):
    judge, params = trained
    seed = 0 if "static" in row[1] else None
    tree = activations.quantized(judge, params, activations.ROWS[row], seed)
    x = judge.data.normalize(judge.data.test_images[:64])
    y, found = judge.apply(params, x), jax.jit(qj.intercept(judge.apply))(tree, x)
    error = np.linalg.norm(found - y) / np.linalg.norm(y)
    # Two layers of 8 bits round by a percent; 4 bits of weights or activations by a tenth or two.
    assert 0 < error < (0.4 if "4" in row[0] else 0.08)


def test_the_images_of_a_static_scale_are_drawn_by_the_seed(trained):
    judge, params = trained
    spec = activations.ROWS["w8a8", "static"]
    leaves = [
        jax.tree.leaves(activations.quantized(judge, params, spec, seed)) for seed in (0, 0, 1)
    ]
    same = [all(map(np.array_equal, leaves[0], other)) for other in leaves[1:]]
    assert same == [True, False]


def test_lost_points_are_counted_against_the_same_network():
    def row(name, how, accuracy, lost, seed=None):
        scores = {"accuracy": accuracy, "loss": 0.5, "lost": lost, "calibration": seed}
        return {"format": name, "method": how, **scores}

    runs = [
        [
            row("float32", "", base, 0.0),
            row("w8a8", "dynamic", base - 0.01, 0.01),
            row("w8a8", "static", base, 0.0, 0),
            row("w8a8", "static", base - 0.02, 0.02, 1),
        ]
        for base in (0.8, 0.9)
    ]
    summary = activations.summarize(runs)
    assert [row["runs"] for row in summary] == [2, 2, 4]
    assert summary[2]["lost"]["mean"] == pytest.approx(0.01)
    table = activations_markdown({"networks": {"mnist": {"summary": summary}}})
    assert table[0] == ("format", "activations", "article's CNN, MNIST")
    assert table[1] == [
        ("float32", "", "85.00 ± 7.07"),
        ("w8a8", "dynamic", "84.00 (1.00)"),
        ("w8a8", "static", "84.00 (1.00 ± 1.15)"),
    ]


def test_a_network_is_measured_beside_its_float_self(trained, monkeypatch):
    judge, params = trained
    monkeypatch.setattr(
        activations, "ROWS", {("w4a8", "dynamic"): activations.ROWS["w4a8", "static"]}
    )
    config = activations.Config(data_dir=Path("unused"))
    base, row = activations.measured(config, judge, params)
    assert base["accuracy"] == judge.test(params)[0]["accuracy"]
    assert row["lost"] == base["accuracy"] - row["accuracy"] and row["calibration"] is None
