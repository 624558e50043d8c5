"""The shared loop: what a step computes, what a run stores, and what it refuses."""

import dataclasses
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import quantjax as qj
from experiments import checkpoint, describe, train
from experiments.evaluate import evaluate
from experiments.metrics import EpochRecord, Judged
from experiments.models import training_apply
from experiments.steps import epoch_order
from experiments.train import TrainConfig, classification_loss
from tests.daily import daily
from tests.tiny_run import CONFIG, assert_equal_trees, linear, make_data, zeros


class TinyNet(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Conv(4, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(3)(x.reshape(len(x), -1))


def test_one_step_is_the_gradient_of_the_mean_cross_entropy():
    data = make_data(count=20)
    config = TrainConfig(optimizer=optax.sgd(0.1), epochs=1, batch_size=20)
    found = train.train(linear, zeros(), data, config)
    x = ((data.train_images / 255 - data.mean) / data.std).reshape(20, 16)
    error = np.eye(3)[data.train_labels] - 1 / 3  # minus d loss / d logits at equal logits
    # float32 against float64: a mean over 20 products of size about 2
    np.testing.assert_allclose(found.params["w"], 0.1 * x.T @ error / 20, atol=1e-6)
    np.testing.assert_allclose(found.params["b"], 0.1 * error.mean(0), atol=1e-6)
    np.testing.assert_allclose(found.history[0].train_loss, np.log(3), rtol=1e-6)


def test_a_run_learns_and_records_every_epoch():
    data, records = make_data(), []
    config = dataclasses.replace(CONFIG, epochs=30)
    found = train.train(linear, zeros(), data, config, on_epoch=lambda r, p: records.append(r))
    assert [r.epoch for r in records] == list(range(30)) and tuple(records) == found.history
    assert records[-1].train_loss < 0.5 * records[0].train_loss
    x = data.normalize(data.validation_images)
    loss, accuracy, _ = evaluate(linear, found.params, x, data.validation_labels)
    assert (loss, accuracy) == (records[-1].validation_loss, records[-1].validation_accuracy)
    assert found.start == (evaluate(linear, zeros(), x, data.validation_labels)[:2],)
    assert accuracy >= 0.9


def test_each_epoch_shuffles_by_seed_and_drops_what_does_not_fill_a_batch():
    orders = [epoch_order(43, 8, 0, epoch) for epoch in (0, 1)]
    assert all(order.shape == (5, 8) and len(np.unique(order)) == 40 for order in orders)
    assert np.any(orders[0] != orders[1])
    np.testing.assert_array_equal(orders[0], epoch_order(43, 8, 0, 0))
    assert np.any(orders[0] != epoch_order(43, 8, 1, 0))
    with pytest.raises(ValueError, match="7 training images do not fill a batch of 8"):
        train.train(linear, zeros(), make_data(count=7), CONFIG)


@functools.cache
def tiny_variables():
    return jax.jit(TinyNet().init)(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))


@pytest.fixture(scope="module")
def whole():
    return batch_norm_run()


def batch_norm_run(**kwargs):
    """A run with all kinds of state: moments, batch statistics, and extra refreshed by step; and
    with images that are drawn anew at each."""
    model = TinyNet()
    return train.train(
        model.apply,
        tiny_variables(),
        make_data(),
        CONFIG,
        loss_fn=classification_loss(training_apply(model)),
        transform=lambda p, extra: jax.tree.map(lambda leaf: leaf * (1 + 0.01 * extra), p),
        extra=jnp.zeros(()),
        refresh=lambda p, extra, step: 0.5 * extra + jnp.cos(1.0 * step),
        refresh_every=3,
        augment=negatives,
        **kwargs,
    )


def test_a_resumed_run_is_bit_identical(tmp_path, whole):
    def stop(record, params):
        if record.epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        batch_norm_run(run_dir=tmp_path, on_epoch=stop)
    seen = []
    resumed = batch_norm_run(run_dir=tmp_path, on_epoch=lambda r, p: seen.append(r.epoch))
    assert seen == [2, 3]
    assert_equal_trees((whole.params, whole.extra), (resumed.params, resumed.extra))
    assert [r[:4] for r in whole.history] == [r[:4] for r in resumed.history]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The arguments of a run that has ended, and where it is stored."""
    same = {"apply": linear, "params": zeros(), "data": make_data(), "config": CONFIG}
    run_dir = tmp_path_factory.mktemp("finished")
    train.train(**same, run_dir=run_dir)
    return same, run_dir


def test_a_finished_run_is_loaded_not_trained(tmp_path, monkeypatch):
    same = {"apply": linear, "params": zeros(), "data": make_data(), "config": CONFIG}
    first = train.train(**same, run_dir=tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert [EpochRecord(**record) for record in metrics["history"]] == list(first.history)
    assert [Judged(**judged) for judged in metrics["start"]] == list(first.start)
    monkeypatch.setattr(train, "_compile", None)
    second = train.train(**same, run_dir=tmp_path)
    assert_equal_trees(first.params, second.params)
    assert (first.history, first.start) == (second.history, second.start)


def negatives(key, images):
    """Half of the images, inverted."""
    return jnp.where(jax.random.bernoulli(key, shape=(len(images), 1, 1, 1)), 255 - images, images)


@pytest.mark.parametrize("augment", daily([None, negatives], [negatives]))
def test_every_epoch_trains_on_its_own_shuffle_and_every_step_on_its_own_images(augment):
    data = make_data()
    config = TrainConfig(optimizer=optax.sgd(0.1), epochs=2, batch_size=20, seed=3)
    found = train.train(linear, zeros(), data, config, augment=augment)
    w, b = np.zeros((16, 3)), np.zeros(3)
    for step, index in enumerate((*epoch_order(43, 20, 3, 0), *epoch_order(43, 20, 3, 1))):
        images = data.train_images[index]
        if augment is not None:
            images = np.asarray(augment(jax.random.fold_in(jax.random.key(3), step), images))
        x = ((images / 255 - data.mean) / data.std).reshape(-1, 16)
        share = np.exp(x @ w + b)
        error = np.eye(3)[data.train_labels[index]] - share / share.sum(1, keepdims=True)
        w, b = w + 0.1 * x.T @ error / 20, b + 0.1 * error.mean(0)
    # float32 against float64: four steps, each a mean over 20 products of size about 2
    np.testing.assert_allclose(found.params["w"], w, atol=4e-6)
    np.testing.assert_allclose(found.params["b"], b, atol=4e-6)


@pytest.mark.parametrize("seed", [0, (0, 1)], ids=["one run", "two"])
def test_an_order_takes_the_place_of_the_shuffle(seed):
    data, count = make_data(), len(CONFIG.seeds) if seed == 0 else 2
    config = TrainConfig(optimizer=optax.sgd(0.1), epochs=2, batch_size=20, seed=seed)
    params = zeros() if seed == 0 else jax.tree.map(lambda x: jnp.stack([x] * count), zeros())
    found = train.train(linear, params, data, config, order=_every_other)
    x = ((data.train_images / 255 - data.mean) / data.std).reshape(-1, 16)
    w, b = np.zeros((16, 3)), np.zeros(3)
    for index in (*_every_other(0), *_every_other(1)):
        share = np.exp(x[index] @ w + b)
        error = np.eye(3)[data.train_labels[index]] - share / share.sum(1, keepdims=True)
        w, b = w + 0.1 * x[index].T @ error / 20, b + 0.1 * error.mean(0)
    # float32 against float64, as above; every run has the one order
    for learned in found.params["w"].reshape(count, 16, 3):
        np.testing.assert_allclose(learned, w, atol=2e-6)


def _every_other(epoch):
    """One step an epoch."""
    return np.arange(epoch, 40, 2, dtype=np.int32)[None]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"config": dataclasses.replace(CONFIG, epochs=5)}, "/config/epochs: 4 != 5"),
        ({"config": dataclasses.replace(CONFIG, optimizer=optax.adam(1e-3))}, "-0.01 != -0.001"),
        ({"config": dataclasses.replace(CONFIG, seed=1)}, "/config/seed: 0 != 1"),
        ({"data": make_data(seed=1)}, "/data/digest"),
        ({"params": {"w": jnp.ones((16, 3)), "b": jnp.zeros(3)}}, r"/initial/\['w'\]/2: 0.0 != 48"),
        ({"transform": lambda p: p}, "/functions/1: None != "),
        ({"augment": negatives}, "/augment: None != "),
    ],
)
def test_a_run_of_another_kind_is_refused(finished, change, message):
    same, run_dir = finished
    with pytest.raises(ValueError, match=f"another run.*{message}"):
        train.train(**(same | change), run_dir=run_dir)


def test_a_scan_over_the_steps_agrees_with_single_steps(whole):
    stepped, scanned = whole, batch_norm_run(scan=True)
    # Two compilations of one step may round differently; 20 steps of Adam at 1e-2 follow.
    compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)  # noqa: E731
    jax.tree.map(compare, stepped[:2], scanned[:2])
    compare([r[1:4] for r in stepped.history], [r[1:4] for r in scanned.history])


@pytest.mark.parametrize("scan", daily([False, True], [True]))
def test_extra_is_refreshed_every_n_steps_of_the_run(scan):
    def note(params, extra, step):
        calls, last = extra
        return calls.at[last].set(step), last + 1

    found = train.train(
        linear,
        zeros(),
        make_data(),
        CONFIG,  # 4 epochs of 5 steps
        transform=lambda p, extra: p,
        extra=(jnp.full(10, -1), jnp.int32(0)),
        refresh=note,
        refresh_every=6,
        scan=scan,
    )
    assert found.extra[0][:5].tolist() == [0, 6, 12, 18, -1]


def test_extra_may_hold_the_parameters_themselves():
    found = train.train(
        linear,
        zeros(),
        make_data(),
        CONFIG,
        transform=lambda p, extra: p,
        extra=zeros(),
        refresh=lambda p, extra, step: p,  # the parameters before the last step
    )
    distance = np.abs(found.params["w"] - found.extra["w"]).max()
    assert 0 < distance < 0.02  # a step of Adam at 1e-2


def test_quantized_parameters_are_refused():
    params = qj.quantize(zeros(), "w8")
    with pytest.raises(ValueError, match="quantized: w .*fake_quantize"):
        train.train(linear, params, make_data(), CONFIG)


def test_transform_acts_in_the_loss_and_in_the_validation():
    start = {"w": jnp.ones((16, 3)), "b": jnp.zeros(3)}
    without_w = lambda p: {"w": 0 * p["w"], "b": p["b"]}  # noqa: E731
    found = train.train(linear, start, make_data(), CONFIG, transform=without_w)
    np.testing.assert_array_equal(found.params["w"], start["w"])  # no gradient; not transformed
    assert np.any(found.params["b"] != 0)
    data = make_data()
    x = data.normalize(data.validation_images)
    seen = evaluate(linear, without_w(found.params), x, data.validation_labels)
    assert found.history[-1].validation_loss == seen[0]


def test_batch_statistics_are_updated_as_state(whole):
    mean = whole.params["batch_stats"]["BatchNorm_0"]["mean"]
    assert np.all(mean != 0)
    assert set(whole.params) == {"params", "batch_stats"}


def test_a_model_with_state_needs_a_loss_that_updates_it():
    params = {"params": zeros(), "batch_stats": {"mean": jnp.zeros(3)}}
    with pytest.raises(ValueError, match="'batch_stats'.*training_apply"):
        train.train(linear, params, make_data(), CONFIG)


def test_the_given_parameters_stay_usable():
    params = zeros()
    train.train(linear, params, make_data(), CONFIG)
    assert_equal_trees(params, zeros())


@pytest.mark.parametrize("scan", daily([False, True], [False]))
def test_a_loss_that_is_not_finite_names_epoch_and_step(tmp_path, scan):
    # The loss becomes nan in the step after the scale does: step 7, the third of epoch 1.
    with pytest.raises(FloatingPointError, match="loss is nan in epoch 1 at step 7"):
        train.train(
            linear,
            zeros(),
            make_data(),
            CONFIG,
            transform=lambda p, scale: jax.tree.map(lambda leaf: leaf * scale, p),
            extra=jnp.ones(()),
            refresh=lambda p, scale, step: jnp.where(step == 7, jnp.nan, scale),
            run_dir=tmp_path,
            scan=scan,
        )
    assert len(checkpoint.load_meta(tmp_path / "checkpoint")["history"]) == 1


@pytest.mark.parametrize("batch_size", daily([1, 4, 10, 64], [4, 64]))
def test_evaluate_counts_every_image_once(batch_size):
    random = np.random.default_rng(0)
    params = {"w": random.normal(size=(16, 3)), "b": random.normal(size=3)}
    params = jax.tree.map(lambda leaf: leaf.astype(np.float32), params)
    x, y = random.normal(size=(10, 4, 4, 1)).astype(np.float32), random.integers(0, 3, 10)
    traces = []

    def apply(params, x):
        traces.append(x.shape)
        return linear(params, x)

    loss, accuracy, predicted = evaluate(apply, params, x, y, batch_size=batch_size)
    logits = x.reshape(10, 16).astype(np.float64) @ params["w"] + params["b"]
    expected = np.log(np.exp(logits).sum(1)) - logits[np.arange(10), y]
    np.testing.assert_allclose(loss, expected.mean(), rtol=1e-5)  # float32 logits of size 10
    np.testing.assert_array_equal(predicted, logits.argmax(1))
    assert accuracy == np.mean(logits.argmax(1) == y)
    assert len(traces) == 1  # the last batch, filled up, is not compiled anew


def test_evaluate_without_images_is_nan():
    loss, accuracy, predicted = evaluate(linear, zeros(), np.zeros((0, 4, 4, 1)), np.zeros(0, int))
    assert np.isnan(loss) and np.isnan(accuracy) and predicted.shape == (0,)


def test_a_checkpoint_keeps_every_bit(tmp_path):
    tree = {
        "half": jnp.asarray([1.5, -0.0, jnp.nan], jnp.bfloat16),
        "count": jnp.int32(7),
        "empty": jnp.zeros((0, 2)),
        "list": [jnp.arange(3, dtype=jnp.uint8)],
        "key": jax.random.key(3),
    }
    checkpoint.save(tmp_path / "c", 0, tree, {"note": [1, "a"]})
    found = checkpoint.load(tmp_path / "c", tree)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(found), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert checkpoint.load_meta(tmp_path / "c") == {"note": [1, "a"]}
    with pytest.raises(ValueError, match=r"\['count'\].*int32.*expected.*float32"):
        checkpoint.load(tmp_path / "c", tree | {"count": jnp.float32(7)})


def test_an_interrupted_write_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "c"
    checkpoint.save(path, 0, zeros(), {"epoch": 1})

    async def interrupted(self, *args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(ocp.JsonCheckpointHandler, "async_save", interrupted)
        checkpoint.save(path, 1, zeros(), {"epoch": 2})
    assert checkpoint.load_meta(path) == {"epoch": 1}
    assert_equal_trees(checkpoint.load(path, zeros()), zeros())
    checkpoint.save(path, 1, zeros(), {"epoch": 2})
    assert checkpoint.load_meta(path) == {"epoch": 2}
    assert [p.name for p in path.iterdir()] == ["1"], "one at a time, and no ruins"


def test_a_description_tells_optimizers_apart():
    schedules = (optax.cosine_decay_schedule(0.1, 100), optax.cosine_decay_schedule(0.1, 200))
    makers = [lambda r=r: optax.adamw(r) for r in (0.1, 0.2, *schedules)]
    makers += [lambda: optax.adamw(0.1, weight_decay=0.5), lambda: optax.sgd(0.1)]
    found = [describe.describe(make()) for make in makers]
    assert found == [describe.describe(make()) for make in makers]
    assert all(a != b for i, a in enumerate(found) for b in found[:i])
