"""Does the experiment train what its table says, in a moment, on small images?"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from experiments import optimizers, qat_article
from experiments.models import ArticleCNN, initialize
from experiments.post_training import Judge, seen
from experiments.qat_article import FLOAT, LAYERS, Cell, Config
from experiments.qat_plots import estimator_figure
from experiments.rows import NotApplicable
from experiments.ways import WAYS, parts, prepared
from quantjax import qat
from tests.daily import daily
from tests.tiny_run import make_larger_data

CELLS = [
    Cell("straight-through", "w4", 4),
    Cell("lsq", "w2", 2),
    Cell("ttq", "ternary", 8),
    Cell("binary_connect", "w1", 32),
    *(Cell(name, way.weights[-1], 4) for name, way in WAYS.items()),
]


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """Of images whose sides are told apart by brightness."""
    model = ArticleCNN(classes=3)
    return Judge(model, make_larger_data(), tmp_path_factory.mktemp("judge"))


@pytest.fixture(scope="module")
def params(judge):
    return initialize(judge.model, judge.data.image_shape, seed=0)


@pytest.mark.full
@pytest.mark.parametrize("cell", daily(CELLS, CELLS[1:2]), ids=str)
def test_a_cell_trains_its_bits_and_stores_what_was_judged(judge, params, monkeypatch, cell):
    monkeypatch.setattr(qat_article, "batches", lambda judge, seed: [_images(judge)])
    config = Config(judge.scratch, epochs=2, batch_size=16)
    run = qat_article.fine_tuned(judge, params, cell, config, seed=0)
    tree, result = run(1e-2)
    kernels = {name: layer["kernel"] for name, layer in tree["params"].items()}
    low = "4" if cell.format == "w4" else "1" if cell.format == "w1" else "2"
    assert {name: q.format.bits for name, q in kernels.items()} == {
        "conv1": 8, "conv2": int(low), "fc1": int(low), "fc2": 8
    }  # fmt: skip
    acts = {name: None if q.act is None else q.act.format for name, q in kernels.items()}
    if cell.activations == 32:
        assert set(acts.values()) == {None}
    else:
        few = WAYS[cell.method].grid(cell.activations)
        assert (acts["conv2"], acts["fc1"]) == (few, few)
        assert (acts["conv1"], acts["fc2"]) == (qj.IntFormat(8), qj.IntFormat(8, signed=False))
    assert judge.validation(seen(tree)) == pytest.approx(
        result.history[-1].validation_accuracy, abs=0.11
    )  # a tie may fall the other way in integers


def _images(judge):
    return judge.data.normalize(judge.data.train_images[:16])


def test_what_is_learned_moves_by_shares_of_its_size(judge, params):
    tree = prepared(judge.apply, params, parts(LAYERS, WAYS["lsq"], "w4", 32), [])
    adam, learned = optimizers.fine_tuning(0.01, 100)
    steps = {"small": jnp.full(4, 0.002), "large": jnp.float32(0.5)}
    updates, _ = learned.update(jax.tree.map(jnp.ones_like, steps), learned.init(steps), steps)
    np.testing.assert_allclose(updates["small"], -0.01 * 0.002, rtol=1e-3)
    np.testing.assert_allclose(updates["large"], -0.01 * 0.5, rtol=1e-3)
    assert set(tree["params"]["conv1"]["kernel"].learned) == {"scale"}
    assert tree["params"]["conv1"]["kernel"].estimator == qat.lsq()


@pytest.mark.parametrize(
    "cell, reason",
    [
        (Cell("twn", "w4", 32), "not defined for these weights"),
        (Cell("pact", "w4", 32), "about activations"),
    ],
)
def test_cells_that_an_estimator_does_not_define_have_a_reason(judge, params, cell, reason):
    with pytest.raises(NotApplicable, match=reason):
        qat_article.fine_tuned(judge, params, cell, Config(judge.scratch, batch_size=16), seed=0)


def test_the_rate_is_chosen_on_validation_images_and_the_test_is_seen_once(
    judge, params, monkeypatch
):
    tested = []
    monkeypatch.setattr(
        Judge, "test", lambda self, tree: (tested.append(tree), ({"accuracy": 0.5}, None))[1]
    )
    config = Config(judge.scratch, epochs=1, batch_size=16)
    row = qat_article.measured(judge, params, FLOAT, config, 0, (1e-5, 1e-2))
    assert len(tested) == 1 and row["rate"] in (1e-5, 1e-2)
    assert row["validation_accuracy"] == max(row["rates"].values())
    assert row["rates"][f"{row['rate']:g}"] == row["validation_accuracy"]


def test_a_figure_is_drawn(tmp_path):
    base = {"network": "n", "seed": 0}
    rows = [
        base | {"method": "float", "format": "float32", "activations": 32, "accuracy": 0.9},
        base | {"method": "lsq", "format": "w2", "activations": 32, "accuracy": 0.8},
        base | {"method": "lsq", "format": "w2", "activations": 2, "accuracy": 0.7},
    ]
    assert estimator_figure(rows, "n", tmp_path).stat().st_size > 1000
