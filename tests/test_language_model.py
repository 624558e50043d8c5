"""The decoder, its tokens and windows, the table of rows, and what judges a quantized decoder."""

import dataclasses
import json
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import quantjax as qj
from experiments import ptq_language_model as ptq
from experiments import train_language_model, wikitext
from experiments.byte_pairs import learn
from experiments.describe import describe
from experiments.language_model import DecoderConfig, forward, initialize, rotate
from experiments.memory import with_peak
from experiments.rows import NotApplicable, Rows
from tests.daily import daily

TINY = DecoderConfig(vocabulary=64, layers=1, width=32, heads=4, key_value_heads=2, hidden=48)
run = jax.jit(forward, static_argnums=0)
TEXT = " = A town = \n a b c d <unk> é of the town \n \n" * 40


@pytest.fixture(scope="module")
def params():
    return initialize(TINY, seed=0)


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (2, 12), 0, TINY.vocabulary)


def test_logits_have_one_value_for_each_next_token(params, tokens):
    logits = run(TINY, params, tokens)
    assert logits.shape == (2, 12, 64) and logits.dtype == jnp.float32


def test_a_later_token_does_not_change_earlier_logits(params, tokens):
    changed = tokens.at[:, 7].add(1) % TINY.vocabulary
    before, after = run(TINY, params, tokens), run(TINY, params, changed)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert (jnp.abs(before[:, 7:] - after[:, 7:]).max((0, 2)) > 1e-4).all()


def test_turned_queries_and_keys_know_only_their_distance(key):
    q, k = jax.random.normal(key, (2, 1, 1, 1, 16))
    row = jnp.ones((1, 20, 1, 1))
    scores = jnp.einsum("btkd,bskd->ts", rotate(q * row, 10_000.0), rotate(k * row, 10_000.0))
    for distance in (-3, 0, 5):
        along = jnp.diagonal(scores, distance)
        # Angles reach 20 radians, whose float32 spacing is 2e-6; 16 terms of size about 1.
        np.testing.assert_allclose(along, jnp.full_like(along, along[0]), atol=16 * 2e-6 * 4)
    assert jnp.std(jnp.diagonal(scores[::-1])) > 0.1  # and they do depend on it


def test_rotating_keeps_lengths_and_the_first_position(key):
    x = jax.random.normal(key, (2, 9, 3, 16))
    turned = rotate(x, 10_000.0)
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])
    np.testing.assert_allclose(
        jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-6
    )


def test_queries_of_a_group_share_their_key_and_value_head(params, tokens):
    """Full attention with repeated key and value heads computes the same."""
    full = dataclasses.replace(TINY, key_value_heads=TINY.heads)

    def repeated(path, x):
        if not any(getattr(p, "key", "") in ("key", "value") for p in path):
            return x
        heads = x.reshape(TINY.width, TINY.key_value_heads, TINY.head_width)
        return jnp.repeat(heads, TINY.heads // TINY.key_value_heads, axis=1).reshape(TINY.width, -1)

    wide = jax.tree_util.tree_map_with_path(repeated, params)
    np.testing.assert_allclose(
        run(full, wide, tokens), run(TINY, params, tokens), rtol=1e-5, atol=1e-6
    )


@pytest.mark.full
def test_mixed_products_are_near_and_have_near_gradients(params, tokens):
    @partial(jax.jit, static_argnums=1)
    def loss(params, config):
        return jnp.mean(forward(config, params, tokens) ** 2)

    mixed = dataclasses.replace(TINY, mixed=True)
    exact, near = (jax.grad(loss)(params, config) for config in (TINY, mixed))
    for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(near), strict=True):
        assert a.dtype == b.dtype == jnp.float32
        # bfloat16 keeps 8 bits; a dozen products in a row.
        assert jnp.linalg.norm(a - b) <= 12 * 2.0**-8 * jnp.linalg.norm(a)


def test_every_projection_and_the_tied_embedding_is_found_and_intercepted(params, tokens):
    apply = partial(forward, TINY)
    found = {site.path for site in qj.sites(apply, params, tokens)}
    kernels = 7 * TINY.layers
    assert len([p for p in found if p.endswith("kernel")]) == kernels
    assert "embedding/embedding" in found
    policy = qj.Policy([(ptq.PROJECTIONS, "w8")])
    quantized = qj.quantize(params, policy)
    assert sum(isinstance(x, qj.QTensor) for x in ptq._leaves(quantized)) == kernels
    near, exact = jax.jit(qj.intercept(apply))(quantized, tokens), run(TINY, params, tokens)
    assert jnp.linalg.norm(near - exact) < 0.05 * jnp.linalg.norm(exact)


@pytest.mark.parametrize("bad", [{"width": 33}, {"key_value_heads": 3}, {"width": 36}])
def test_sizes_that_do_not_divide_are_refused(bad):
    with pytest.raises(ValueError, match="must divide"):
        dataclasses.replace(TINY, **bad)


TOKENIZER = learn(TEXT, 280)


@given(text=st.text(max_size=40) | st.text(alphabet=" \nabé", max_size=40))
def test_decoding_gives_the_text_back(text):
    tokenizer = TOKENIZER
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert len(tokens) <= len(text.encode()) and (tokens < tokenizer.vocabulary).all()


def test_learning_merges_the_most_frequent_pair_and_breaks_ties_by_the_smaller():
    # " x", "xy" and "ab" occur three times each, and a space is the smallest byte; then " x"
    # is a token of number 256, above the letters of "ab".
    tokenizer = learn("ab ab ab xy xy xy", 258)
    assert [tokenizer.decode([i]) for i in (256, 257)] == [" x", "ab"]
    assert learn("ab ab ab xy xy xy", 258) == tokenizer
    with pytest.raises(ValueError, match="256 bytes"):
        learn(TEXT, 100)


def test_a_pair_is_counted_anew_after_each_merge():
    """Against counting everything from scratch at every step."""
    text = "banana bandana ananas " * 3 + "cabana"
    tokenizer = learn(text, 270)
    from experiments.byte_pairs import PIECE, _merge

    words = [list(p.encode()) for p in PIECE.findall(text)]
    for i, pair in enumerate(tokenizer.merges):
        counts: dict = {}
        for word in words:
            for p in zip(word, word[1:], strict=False):
                counts[p] = counts.get(p, 0) + 1
        assert pair == min(counts, key=lambda p: (-counts[p], p))
        words = [_merge(word, pair, 256 + i) for word in words]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for split in ("train", "valid", "test"):
        (folder / f"wiki.{split}.tokens").write_text(TEXT, encoding="utf8")
    return folder


def test_windows_follow_each_other_and_labels_are_the_next_tokens(folder):
    data = wikitext.load(folder, vocabulary=280, context=16)
    tokens = data.tokenizer.encode(TEXT)
    count = data.test_images.size
    assert len(tokens) - 16 <= count < len(tokens)
    np.testing.assert_array_equal(data.test_images.ravel(), tokens[:count])
    np.testing.assert_array_equal(data.test_labels.ravel(), tokens[1 : count + 1])
    covered = data.tokenizer.decode(tokens[1 : count + 1])
    assert data.test_words == len(covered.replace("\n", " <eos> ").split())


def test_missing_text_names_the_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"wiki\.train\.tokens.*--data-dir"):
        wikitext.load(tmp_path)


@pytest.fixture(scope="module")
def config(folder):
    decoder = dataclasses.replace(TINY, vocabulary=280, layers=1)
    return train_language_model.Config(
        folder, decoder=decoder, context=16, epochs=2, warmup=2, out=folder / "runs"
    )


def test_a_trained_run_is_found_again(config):
    _, params, _, history = train_language_model.load(config)
    assert history[-1].validation_loss < history[0].validation_loss
    _, again, _, same = train_language_model.load(config)
    assert same == history
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_a_run_is_the_same_whether_its_module_was_imported_or_run(monkeypatch):
    imported = describe(train_language_model.load)
    monkeypatch.setattr(train_language_model.load, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", train_language_model.__spec__)
    assert describe(train_language_model.load) == imported


def test_rows_are_written_at_once_and_not_computed_again(tmp_path):
    table = Rows(tmp_path / "rows.json", {"checkpoint": "a", "sizes": (1, 2)})
    assert table.row({"method": "m", "seed": 0}, lambda: {"kl": 1.0}, device="here")["kl"] == 1.0
    stored = json.loads(table.path.read_text())
    assert stored["device"] == "here"
    assert stored["rows"] == [{"method": "m", "seed": 0, "kl": 1.0, "device": "here"}]
    assert table.row({"method": "m", "seed": 0}, lambda: pytest.fail("computed again"))["kl"] == 1.0
    table.row({"method": "m", "seed": 1}, lambda: {"kl": 2.0})
    assert [row["seed"] for row in table.stored()] == [0, 1]


def test_rows_that_another_process_adds_meanwhile_stay(tmp_path):
    mine, other = (Rows(tmp_path / "rows.json", {}) for _ in range(2))

    def compute():
        other.row({"method": "theirs"}, lambda: {})
        return {}

    mine.row({"method": "mine"}, compute)
    assert [row["method"] for row in mine.stored()] == ["theirs", "mine"]


def test_a_row_that_fails_holds_the_reason_and_is_tried_again(tmp_path, capsys):
    table = Rows(tmp_path / "rows.json", {})

    def fails(error):
        raise error

    key = {"method": "m"}
    assert table.row(key, lambda: fails(NotApplicable("no bits")))["reason"] == "no bits"
    assert table.row(key, lambda: fails(ValueError("bad")))["reason"] == "ValueError: bad"
    assert "Traceback" in capsys.readouterr().err  # of the error, not of the other
    assert table.row(key, lambda: {"kl": 3.0}) == {"method": "m", "kl": 3.0}
    assert table.stored() == [{"method": "m", "kl": 3.0}]
    with pytest.raises(KeyboardInterrupt):
        table.row({"method": "n"}, lambda: fails(KeyboardInterrupt()))


def test_rows_of_another_experiment_are_refused(tmp_path):
    Rows(tmp_path / "rows.json", {"checkpoint": "a"}).row({"method": "m"}, lambda: {})
    with pytest.raises(ValueError, match="checkpoint: a != b"):
        Rows(tmp_path / "rows.json", {"checkpoint": "b"}).row({"method": "m"}, lambda: {})


def test_rows_of_a_network_that_was_trained_anew_are_refused(tmp_path):
    table = Rows(tmp_path / "rows.json", {})
    row = table.of_network({"seed": 0}, {"w": np.ones(2)}, lambda: {"loss": 1.0})
    assert table.of_network({"seed": 0}, {"w": np.ones(2)}, pytest.fail) == row
    with pytest.raises(ValueError, match="'seed': 0.*other parameters"):
        table.of_network({"seed": 0}, {"w": np.zeros(2)}, pytest.fail)
    table.of_network({"seed": 1}, {"w": np.zeros(2)}, lambda: {"loss": 2.0})


@pytest.fixture(scope="module")
def judge(params):
    draw = np.random.RandomState(0).randint(0, TINY.vocabulary, (5, 13))
    return ptq.Judge(partial(forward, TINY), params, draw[:, :-1], draw[:, 1:])


def test_the_float_model_does_not_differ_from_itself(judge, params):
    scores = judge.scores(params)
    assert scores["kl"] == 0 and scores["kl_error"] == 0
    logits = np.asarray(run(TINY, params, judge.inputs), np.float64)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.take_along_axis(p, judge.targets[..., None], -1)
    assert scores["perplexity"] == pytest.approx(np.exp(-np.log(chosen).mean()), rel=1e-5)


def test_divergence_is_that_of_the_definition(judge, params):
    tree = qj.quantize(params, qj.Policy([(ptq.PROJECTIONS, "w2")]))
    logits = [np.asarray(run(TINY, t, judge.inputs), np.float64) for t in
              (params, qj.dequantize(tree))]  # fmt: skip
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in logits)
    expected = (p * np.log(p / q)).sum(-1).mean()
    assert judge.scores(tree)["kl"] == pytest.approx(expected, rel=1e-3)  # float32 sums cancel


@pytest.mark.full
@pytest.mark.parametrize("format", daily(["w3g64", "w4a8"], ["w4a8"]))
def test_a_row_says_what_a_method_costs_and_gives(judge, params, format):
    config = dataclasses.replace(TINY)
    problem = ptq.Problem(config, judge.apply, params, format, [jnp.asarray(judge.inputs)])
    row = ptq.measured(ptq.METHODS["mse"], problem, judge)
    assert 0 < row["kl"] < row["embedding_8_bits"]["kl"] * 1.5
    # float32 scales: one a group of 32 inputs (48 make a group and a short one), or one an output
    assert row["bits_per_weight"] > int(format[1]) + 0.5
    assert row["seconds"] > 0


def test_what_a_method_cannot_do_is_a_reason(judge, params):
    problem = ptq.Problem(TINY, judge.apply, params, "w8", [])
    with pytest.raises(NotApplicable, match="4 bits"):
        ptq.METHODS["nf4"].run(problem)
    with pytest.raises(NotApplicable, match="quantize activations"):
        ptq.METHODS["smoothquant"].run(problem)


def test_calibration_text_is_drawn_by_the_seed(config):
    data = wikitext.load(config.data_dir, vocabulary=280, context=16)
    numbered = np.arange(500 * 16, dtype=np.int32).reshape(500, 16)
    data = dataclasses.replace(data, train_images=numbered)
    first, again, other = (ptq.calibration_batches(data, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first[0], again[0])
    assert not np.array_equal(first[0], other[0])
    assert len(np.unique(np.concatenate(first)[:, 0])) == ptq.SEQUENCES


def test_the_peak_is_that_of_the_call():
    result, peak = with_peak(lambda: np.ones(2**23).sum())  # 64 MiB
    assert result == 2**23
    assert peak is None or 0.9 * 2**26 < peak < 1.5 * 2**26  # give or take pages in use already
