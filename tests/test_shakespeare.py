"""The characters, their windows, and the experiment that trains on them, on a text made up here."""

import json

import numpy as np
import pytest

from experiments import qat_transformer, shakespeare
from experiments.language_model import DecoderConfig
from tests.daily import daily

LINES = "to be, or not to be:\nthat is the question.\n" * 40


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "input.txt").write_text(LINES)
    return tmp_path


def test_windows_are_the_text_and_what_comes_next(folder):
    data = shakespeare.load(folder, context=16)
    say = data.tokenizer.decode
    whole = len(LINES) * 18 // 20
    assert say(data.train_images.ravel()) == LINES[: whole // 16 * 16][: data.train_images.size]
    assert say(data.train_labels.ravel()) == LINES[1 : data.train_images.size + 1]
    # The three parts follow each other without overlap.
    assert say(data.validation_images[0]) == LINES[whole : whole + 16]
    test = len(LINES) * 19 // 20
    assert say(data.test_images[0]) == LINES[test : test + 16]
    assert data.test_words == len(say(data.test_labels.ravel()).replace("\n", " ; ").split())


def test_a_folder_without_the_text_and_an_unknown_letter_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tiny Shakespeare: none of .*input\.txt"):
        shakespeare.load(tmp_path)
    with pytest.raises(ValueError, match="'z' is not among the 2 characters"):
        shakespeare.Characters.of("ab").encode("az")


def test_a_decoder_for_another_alphabet_is_refused(folder):
    config = qat_transformer.Config(data_dir=folder, context=16, out=folder / "runs")
    with pytest.raises(ValueError, match="has 17 characters, the decoder 65"):
        qat_transformer.main(config)


@pytest.mark.parametrize(
    "asked",
    daily(
        [{"rates": (1e-3,), "state_bits": (), "formats": ("w2",)}, {"rates": (1e-3, 2e-3)}],
        [{"rates": (1e-3,), "state_bits": (), "formats": ("w2",)}],
    ),
    ids=["one format", "all"],
)
def test_every_row_is_a_training(asked, folder):
    decoder = DecoderConfig(
        vocabulary=17, layers=1, width=16, heads=2, key_value_heads=1, hidden=16
    )
    config = qat_transformer.Config(
        data_dir=folder, decoder=decoder, context=16, batch_size=8, epochs=1, more_epochs=1,
        seeds=(0,), out=folder / "runs", **asked,
    )  # fmt: skip
    qat_transformer.main(config)
    table = folder / "runs/results/qat_transformer.json"
    payload = json.loads(table.read_text())
    rows = payload["rows"]
    assert not [row["reason"] for row in rows if "reason" in row]
    # The float network that all formats start from has its row, asked for or not.
    of_state = {row["state_bits"]: row for row in rows if row["table"] == "optimizer"}
    assert of_state.keys() == {32, *config.state_bits}
    trained = {(row["method"], row["format"]): row for row in rows if row["table"] == "formats"}
    assert set(trained) - {("float", "float32")} == {
        cell for cell in qat_transformer.WAYS if cell[1] in config.formats
    }
    low = trained["lsq", "w2"]
    assert low["validation_loss"] == min(low["rates"].values()) == low["rates"][f"{low['rate']:g}"]
    assert low["bits_per_weight"] < trained["float", "float32"]["bits_per_weight"] == 32
    assert all(np.isfinite(row["loss"]) for row in rows)

    # Trained anew it would be another network, whose rows do not belong beside these.
    of_state[32]["checkpoint"] = "another"
    table.write_text(json.dumps(payload | {"rows": rows[:-1]}))
    with pytest.raises(ValueError, match="are of other parameters"):
        qat_transformer.main(config)
