"""The words, their order and the state that is carried, on a text made up here."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from experiments import qat_words, wikitext
from experiments.windows import Streams
from experiments.word_model import WordModel, carried_loss, nats, with_state

TEXT = "the cat saw the dog\nthe dog saw a cat and the cat ran\n" * 8


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "valid", "test"):
        (tmp_path / f"wiki.{split}.tokens").write_text(TEXT)
    return tmp_path


@pytest.fixture(scope="module")
def model():
    return WordModel(vocabulary=5, width=4)


@pytest.fixture(scope="module")
def variables(model):
    return jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))


def test_words_are_numbered_by_how_common_they_are(folder):
    data = wikitext.load_words(folder, context=4, judged=8)
    assert data.tokenizer.words[:2] == ("the", "cat") and len(data.tokenizer.words) == 8
    said = data.tokenizer.decode(data.train_images.ravel())
    assert said == " ".join(TEXT.replace("\n", " <eos> ").split()[: data.train_images.size])
    assert data.train_images.shape[1] == 4 and data.test_images.shape[1] == 8
    assert data.test_words == data.test_labels.size
    with pytest.raises(ValueError, match="'fish' is not among the 8 words"):
        data.tokenizer.encode("the fish")
    with pytest.raises(FileNotFoundError, match=r"wiki\.train\.tokens"):
        wikitext.load_words(folder / "none")


def test_streams_go_on_where_they_were():
    order = Streams(examples=23, batch=3, pieces=2)
    read = np.concatenate([order(0), order(1)])
    np.testing.assert_array_equal(np.diff(read, axis=0), 1)  # each is followed by the next
    assert read[0].tolist() == [0, 7, 14] and len(read) == 2 * order.steps == 6
    np.testing.assert_array_equal(order(2), order(0))
    with pytest.raises(ValueError, match="4 windows give 3 parts of 2 pieces no step"):
        Streams(4, 3, 2)(0)


def test_the_state_is_carried_from_window_to_window(model, variables):
    words = np.random.default_rng(0).integers(0, 5, (3, 4)).astype(np.int32)
    targets = np.roll(words, -1)
    logits, _ = jax.jit(model.apply)(variables, words.reshape(1, -1))
    logits = np.asarray(logits[0], np.float64)
    chosen = np.take_along_axis(logits, targets.reshape(-1, 1), 1)[:, 0]
    expected = np.mean(np.log(np.exp(logits).sum(-1)) - chosen)
    assert nats(model.apply, variables, words, targets) == pytest.approx(expected, rel=1e-5)
    # And so it is in training: the second step's loss depends on the first step's words.
    loss = jax.jit(carried_loss(lambda v, w, s, key: model.apply(v, w, s, None)))
    tree = with_state(variables, 4, 1, seed=0)
    losses = []
    for x, y in zip(words, targets, strict=True):
        value, updates = loss(tree, x[None], y[None])
        losses.append(value)
        tree = tree | updates
    assert float(np.mean(losses)) == pytest.approx(expected, rel=1e-5)


def test_dropout_drops_half_and_keeps_the_mean(model, variables):
    key = jax.random.key(1)
    x = jnp.full((4, 1000), 0.5)
    dropped = model.apply(variables, x, key, method="_dropped")
    assert set(np.unique(dropped)) == {0.0, 0.5} and abs(float(dropped.mean()) - 0.25) < 0.02
    words = jnp.zeros((1, 3), jnp.int32)
    draw = jax.jit(jax.vmap(lambda key: model.apply(variables, words, None, key)[0]))
    many = draw(jax.random.split(key, 2000))
    alone = jax.jit(model.apply)(variables, words)[0]
    # Not equal, as the cell is no line; of small weights nearly.
    np.testing.assert_allclose(many.mean(0), alone, atol=0.02)
    assert float(many.std(0).min()) > 0


def config_of(folder, **asked):
    return qat_words.Config(
        data_dir=folder, width=4, context=4, judged=16, batch_size=2, passes=1, more_passes=1,
        rates=(1e-3,), pieces=2, seeds=(0,), out=folder / "runs", **asked,
    )  # fmt: skip


def test_a_training_goes_on_behind_its_last_piece(folder):
    data = wikitext.load_words(folder, context=4, judged=16)
    model = WordModel(len(data.tokenizer.words), width=4)

    def trained(stop_after):
        config = config_of(folder)
        on_epoch = qat_words.stopping(stop_after)
        return qat_words.first_training(qat_words.Problem(config, data, model, 0, on_epoch))

    with pytest.raises(SystemExit, match="stopped after 1 pieces"):
        trained(1)
    trained(None)
    history = json.loads(next(folder.rglob("metrics.json")).read_text())["history"]
    assert [record["epoch"] for record in history] == [0, 1]
    assert history[1]["train_loss"] < history[0]["train_loss"]


@pytest.mark.full
def test_every_row_is_computed(folder):
    qat_words.main(config_of(folder))
    rows = json.loads((folder / "runs/results/qat_words.json").read_text())["rows"]
    assert not [row["reason"] for row in rows if "reason" in row]
    found = {(row["method"], row["format"]): row for row in rows}
    assert len(found) == len(rows) == 2 + 2 * len(qat_words.FORMATS)
    trained = [found["lsq", format]["bits_per_weight"] for format in qat_words.FORMATS]
    assert max(trained) < found["float", "float32"]["bits_per_weight"] == 32
    assert all(1 < row["perplexity"] < 20 for row in rows)


def test_every_matrix_has_the_bits_of_the_row(variables):
    resolved = qat_words.policy("w2a3").resolve(variables)
    specs = {path.removeprefix("params/"): one.spec for path, one in resolved.leaves if one.spec}
    assert {spec.format for spec in specs.values()} == {qj.preset("w2").otherwise.format}
    assert specs.pop("embedding/embedding").act is None
    assert {path: spec.act.format.bits for path, spec in specs.items()} == {
        **{f"cell/i{gate}/kernel": 8 for gate in "ifgo"},
        **{f"cell/h{gate}/kernel": 3 for gate in "ifgo"},
        "head/kernel": 3,
    }
