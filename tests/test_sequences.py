"""The sequences and their frames, on waves and files made up here."""

import jax
import numpy as np
import pytest

from experiments import mel, sequences
from experiments.models import initialize
from experiments.recurrent import RecurrentClassifier
from tests.daily import daily


def write_digits(folder, *, label="label"):
    """Two digits, each said by one speaker twelve times: a low tone and a high one."""
    random = np.random.default_rng(0)
    waves, labels, index = [], [], []
    for digit, pitch in ((0, 300), (1, 2000)):
        for i in range(12):
            time = np.arange(900 + 150 * i) / 8000
            wave = np.sin(2 * np.pi * pitch * time) + 0.1 * random.normal(size=time.size)
            waves.append((8000 * wave).astype(np.int16))
            labels.append(digit)
            index.append(i)
    arrays = {
        "audio": np.concatenate(waves),
        "offset": np.cumsum([0, *map(len, waves)]).astype(np.int32),
        label: np.array(labels, np.uint8),
        "index": np.array(index, np.uint8),
    }
    folder.mkdir(exist_ok=True)
    np.savez(folder / "fsdd_8khz.npz", **arrays)
    return waves


def write_vowels(folder, *, train=12):
    """Two speakers, told apart by the sign of the first coefficient."""
    random = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", train), ("test", 3)):
        y = np.repeat(np.arange(2, dtype=np.uint8), count)
        x = random.normal(size=(2 * count, 8, 3)).astype(np.float32)
        x[..., 0] += np.where(y, 5, -5)[:, None]
        arrays |= {f"x_{part}": x, f"y_{part}": y}
        arrays[f"len_{part}"] = random.integers(4, 9, 2 * count).astype(np.int32)
    np.savez(folder / "japanese_vowels.npz", **arrays)
    return arrays


def test_a_tone_is_loudest_in_the_band_it_lies_in():
    wave = np.sin(2 * np.pi * 1000 * np.arange(2000) / 8000)
    found = mel.log_mel(wave, 8000)
    assert found.shape == (1 + (2000 - 256) // 160, 32) and found.dtype == np.float32
    top = 2595 * np.log10(1 + 4000 / 700)
    corners = 700 * (10 ** (np.linspace(0, top, 34) / 2595) - 1)
    assert set(found.argmax(1)) == {np.abs(corners[1:-1] - 1000).argmin()}
    np.testing.assert_allclose(
        mel.log_mel((2**14 * wave).astype(np.int16), 8000), mel.log_mel(wave / 2, 8000), atol=1e-2
    )


def test_energies_are_those_of_a_slow_transform():
    wave = np.random.default_rng(0).normal(size=300)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(256) / 255)
    energies = []
    for k in range(129):
        turns = np.exp(-2j * np.pi * k * np.arange(256) / 256)
        energies.append(abs((wave[:256] * window * turns).sum()) ** 2 / 256)
    expected = np.log(1e-6 + np.array(energies) @ mel.triangles(8000, 256, 32))
    np.testing.assert_allclose(mel.log_mel(wave, 8000), expected[None], rtol=1e-5)
    # Between the first peak and the last, every frequency is shared out whole.
    weights = mel.triangles(8000, 256, 32).sum(1)
    inner = slice(weights.argmax(), 129 - weights[::-1].argmax())
    np.testing.assert_allclose(weights[inner], 1)


def test_waves_and_bands_that_give_no_frame_are_refused():
    assert (mel.log_mel(np.zeros(3, np.int16), 8000) == np.float32(np.log(1e-6))).all()
    with pytest.raises(ValueError, match="holds no sample"):
        mel.log_mel(np.zeros(0), 8000)
    with pytest.raises(ValueError, match="200 bands are too many for the 129"):
        mel.triangles(8000, 256, 200)


def test_spoken_digits_are_split_by_recording(tmp_path):
    waves = write_digits(tmp_path / "fsdd")
    data = sequences.load("spoken_digits", data_dir=tmp_path)
    # Of each digit: 0 to 4 are the test, 5 to 9 for validation.
    assert [len(x) for x in (data.train_labels, data.validation_labels, data.test_labels)] == [
        4, 10, 10
    ]  # fmt: skip
    frames = mel.log_mel(waves[0], 8000)
    first = data.test_images[0]
    np.testing.assert_array_equal(first[: len(frames), :-1], frames)
    assert (first[len(frames) :] == 0).all() and first[..., -1].sum() == len(frames)
    np.testing.assert_array_equal(
        data.validation_images[5][:, :-1][: len(mel.log_mel(waves[17], 8000))],
        mel.log_mel(waves[17], 8000),
    )
    normal = np.asarray(data.normalize(data.train_images))
    there = normal[..., -1] > 0
    known = normal[there][:, :-1]
    np.testing.assert_allclose((known.mean(0), known.std(0)), ([0] * 32, [1] * 32), atol=1e-4)
    assert (normal[~there] == 0).all()


def test_vowels_leave_the_last_of_each_speaker_for_validation(tmp_path):
    arrays = write_vowels(tmp_path)
    data = sequences.load("japanese_vowels", data_dir=tmp_path)
    assert [len(x) for x in (data.train_labels, data.validation_labels, data.test_labels)] == [
        14, 10, 6
    ]  # fmt: skip
    held = [*range(7, 12), *range(19, 24)]
    for i, source in enumerate(held):
        count = arrays["len_train"][source]
        one = data.validation_images[i]
        np.testing.assert_array_equal(one[:count, :-1], arrays["x_train"][source, :count])
        assert one[:, -1].tolist() == [1.0] * count + [0.0] * (len(one) - count)


def test_what_is_missing_or_damaged_is_named(tmp_path):
    with pytest.raises(ValueError, match="unknown sequences 'tones': expected one of spoken_d"):
        sequences.load("tones", data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none of .*fsdd_8khz\.npz, .*fsdd.fsdd_8khz"):
        sequences.load("spoken_digits", data_dir=tmp_path)
    write_digits(tmp_path, label="other")
    with pytest.raises(ValueError, match=r"fsdd_8khz\.npz: not the arrays of spoken_d.*label"):
        sequences.load("spoken_digits", data_dir=tmp_path)
    with pytest.raises(ValueError, match="sequence 1 holds no frame"):
        sequences.padded([np.ones((2, 1)), np.ones((0, 1))], 4)


@pytest.mark.parametrize("cell", daily(["lstm", "gru"], ["lstm"]))
def test_no_logit_sees_the_padding(cell):
    model = RecurrentClassifier(classes=3, cell=cell, hidden=4)
    params = initialize(model, (6, 3), seed=0)
    random = np.random.default_rng(0)
    frames = [random.normal(size=(count, 2)) for count in (2, 5)]
    x = sequences.padded(frames, 6)
    noise = np.where(x[..., -1:] > 0, x, np.float32([9.0, -9.0, 0.0]))
    apply = jax.jit(model.apply)
    logits = np.asarray(apply(params, x))
    np.testing.assert_array_equal(apply(params, noise), logits)
    alone = apply(params, sequences.padded(frames[:1], 2))
    np.testing.assert_allclose(alone, logits[:1], atol=1e-6)
    assert np.abs(np.diff(logits, axis=0)).max() > 1e-3
