"""The shared loop on leaves of `qat.prepare`, on several runs, and on what is not finite."""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import quantjax as qj
from experiments import metrics, train
from experiments.train import TrainConfig
from quantjax import qat
from quantjax.fake_quantized import FakeQuantized, fake_array
from quantjax.levels import fake_quantize_levels
from quantjax.policy import preset_spec
from quantjax.spec import Granularity, QuantSpec
from tests.daily import daily
from tests.qat.estimators import normal
from tests.tiny_run import CONFIG, assert_equal_trees, linear, make_data, zeros

CONFIG = dataclasses.replace(CONFIG, epochs=3)
SHORT = dataclasses.replace(CONFIG, epochs=2, learned=optax.adam(1e-3))
ACT = QuantSpec(
    format=qj.IntFormat(4, signed=False), block=Granularity.TENSOR, static=True, observer=qj.mse()
)


def mlp(params, x):
    x = jax.nn.relu(x.reshape(len(x), -1) @ params["a"]["kernel"] + params["a"]["bias"])
    return x @ params["b"]["kernel"]


run = qj.intercept(mlp)
PARAMS = {
    "a": {"kernel": normal(16, 8) / 4, "bias": jnp.zeros(8)},
    "b": {"kernel": normal(8, 3, seed=1) / 3},
}
POLICY = qj.Policy(
    [
        ("a/kernel", preset_spec("w8")),
        ("b/kernel", dataclasses.replace(preset_spec("w3"), act=ACT)),
    ]
)


@functools.cache
def calibrated():
    data = make_data()
    return qj.calibrate(mlp, PARAMS, [data.normalize(data.train_images)], POLICY)


def tree(estimator):
    """Weights of 8 and of 3 bits and an activation of 4, as this estimator trains them."""
    return qat.prepare(PARAMS, like=calibrated(), estimator=estimator)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run whose leaves learn steps, saved after each epoch."""
    folder = tmp_path_factory.mktemp("lsq")
    return train.train(run, tree(qat.lsq()), make_data(), SHORT, run_dir=folder), folder


def test_a_prepared_tree_is_trained_with_what_its_estimator_learns(trained):
    found, _ = trained
    start, end = tree(qat.lsq()), found.params
    assert found.history[-1].train_loss < found.history[0].train_loss
    for before, after in ((start["a"], end["a"]), (start["b"], end["b"])):
        moved = before["kernel"].learned["scale"] - after["kernel"].learned["scale"]
        assert 0 < np.abs(moved).max() < 0.02  # ten steps of Adam at 1e-3, not at 1e-2
        assert np.abs(before["kernel"].value - after["kernel"].value).max() > 0.02
    assert np.any(
        start["b"]["kernel"].act_learned["scale"] != end["b"]["kernel"].act_learned["scale"]
    )
    # What is stored is what was judged.
    data = make_data()
    x, floats = data.normalize(data.validation_images), qj.dequantize(qat.finalize(end))
    rounded = jax.jit(fake_array)(end["a"]["kernel"])
    np.testing.assert_array_equal(floats["a"]["kernel"], rounded)
    accuracy = np.mean(np.argmax(jax.jit(run)(qat.finalize(end), x), -1) == data.validation_labels)
    assert accuracy == found.history[-1].validation_accuracy


def test_a_prepared_tree_resumes_bit_for_bit(trained, tmp_path):
    whole, _ = trained

    def stop(record, params):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.train(run, tree(qat.lsq()), make_data(), SHORT, run_dir=tmp_path, on_epoch=stop)
    resumed = train.train(run, tree(qat.lsq()), make_data(), SHORT, run_dir=tmp_path)
    assert_equal_trees(whole.params, resumed.params)
    assert [r[:4] for r in whole.history] == [r[:4] for r in resumed.history]


def test_a_checkpoint_of_another_estimator_is_refused(trained):
    # Its arrays have the same names, shapes and values.
    other = qat.Estimator(qat.paretoq().weights, qat.lsq().activations)
    start = jax.tree.map(lambda x: x, tree(qat.lsq()))
    for layer in start.values():
        layer["kernel"] = dataclasses.replace(layer["kernel"], estimator=other)
    with pytest.raises(ValueError, match="/rounding/a/kernel/estimator.*LSQWeights != ParetoQWeig"):
        train.train(run, start, make_data(), SHORT, run_dir=trained[1])


def test_given_scales_integers_and_keys_stay():
    start = {
        "linear": {"kernel": qat.prepare(normal(16, 3), "w4")},
        "count": jnp.int32(3),
        "key": jax.random.key(1),
    }
    apply = qj.intercept(lambda p, x: x.reshape(len(x), -1) @ p["linear"]["kernel"])
    decayed = dataclasses.replace(CONFIG, optimizer=optax.adamw(1e-2, weight_decay=0.5))
    found = train.train(apply, start, make_data(), decayed).params
    leaf = found["linear"]["kernel"]
    assert isinstance(leaf, FakeQuantized) and np.any(leaf.value != start["linear"]["kernel"].value)
    np.testing.assert_array_equal(leaf.scale, start["linear"]["kernel"].scale)
    assert found["count"] == 3
    assert jax.random.key_data(found["key"]).tolist() == [0, 1]


def test_estimators_are_told_how_far_the_training_is():
    seen = []

    def apply(tree, x):
        jax.debug.callback(lambda p: seen.append(float(p)), tree["kernel"].progress)
        return x.reshape(len(x), -1) @ fake_array(tree["kernel"])

    start = qat.prepare({"kernel": normal(16, 3)}, "binary", estimator=qat.ir_net())
    data = make_data()
    found = train.train(apply, start, data, dataclasses.replace(CONFIG, epochs=2))
    jax.effects_barrier()
    # Judged before it begins and after each epoch of five steps.
    expected = [0, *np.arange(5) / 10, 0.5, *np.arange(5, 10) / 10, 1]
    np.testing.assert_allclose(seen, expected, rtol=1e-6)
    assert found.params["kernel"].progress == 1


def test_what_a_step_leaves_of_the_parameters_is_projected():
    project = lambda p: {"w": jnp.clip(p["w"], -0.01, 0.02), "b": p["b"]}  # noqa: E731
    found = train.train(linear, zeros(), make_data(), CONFIG, project=project)
    assert (found.params["w"].min(), found.params["w"].max()) == (
        np.float32(-0.01),
        np.float32(0.02),
    )


def stacked(*trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@pytest.mark.parametrize("scan", daily([False, True], [True]))
def test_runs_at_once_are_those_one_by_one(scan, tmp_path):
    """Of other seeds, other first values, and other bit widths, on images of their own."""
    starts = [{"w": normal(16, 3, seed=i) / 4, "b": jnp.zeros(3)} for i in range(3)]
    tops, seeds = [1.0, 7.0, 127.0], (5, 3, 3)

    def levels(params, top):
        return params | {"w": fake_quantize_levels(params["w"], 1 / top, -top, top)}

    def dimmed(key, images):
        return images // jax.random.randint(key, (len(images), 1, 1, 1), 1, 3).astype(jnp.uint8)

    def trained(start, seed, top, **where):
        config = dataclasses.replace(CONFIG, seed=seed)
        given = {"transform": levels, "extra": top, "augment": dimmed, "scan": scan, **where}
        return train.train(linear, start, make_data(), config, **given)

    heard = []
    hear = lambda record, params: heard.append((record, np.asarray(params["w"])))  # noqa: E731
    together = trained(stacked(*starts), seeds, jnp.asarray(tops), run_dir=tmp_path, on_epoch=hear)
    again = trained(stacked(*starts), seeds, jnp.asarray(tops), run_dir=tmp_path)
    assert_equal_trees(together.params, again.params)
    assert together.history == again.history
    # Two programs may sum in another order; 15 steps of Adam at 1e-2 follow.
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    for i, (start, seed, top) in enumerate(zip(starts, seeds, tops, strict=True)):
        alone = trained(start, seed, jnp.float32(top))
        mine = [record for record in together.history if record.run == i]
        jax.tree.map(lambda a, b, i=i: compare(a[i], b), together.params, alone.params)
        compare([r[1:4] for r in mine], [r[1:4] for r in alone.history])
        compare(together.start[i], alone.start[0])
        assert [(r.epoch, r.run) for r in mine] == [(e, i) for e in range(3)]
        np.testing.assert_array_equal(together.params["w"][i], heard[i - 3][1])
    assert [record for record, _ in heard] == list(together.history)


def test_prepared_trees_of_several_seeds_train_at_once():
    trees = [tree(qat.lsq()), jax.tree.map(lambda x: x, tree(qat.lsq()))]
    config = dataclasses.replace(SHORT, epochs=1, seed=(0, 1))
    together = train.train(run, stacked(*trees), make_data(), config)
    alone = train.train(run, trees[1], make_data(), dataclasses.replace(config, seed=1))
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(lambda a, b: compare(a[1], b), together.params, alone.params)


def test_trees_of_several_runs_must_be_stacked():
    config = dataclasses.replace(CONFIG, seed=(0, 1))
    with pytest.raises(ValueError, match=r"params\['b'\]: 2 seeds need a first axis of 2.*\(3,\)"):
        train.train(linear, zeros(), make_data(), config)
    with pytest.raises(ValueError, match=r"extra: 2 seeds need a first axis of 2.*\(\)"):
        both = stacked(zeros(), zeros())
        train.train(linear, both, make_data(), config, extra=jnp.zeros(()))
    with pytest.raises(ValueError, match="one or more are needed"):
        TrainConfig(optax.sgd(0.1), 1, seed=())


@jax.custom_vjp
def bad_slope(x, bad):
    """x, whose derivative is nan where `bad` says so."""
    return x


bad_slope.defvjp(lambda x, bad: (x, bad), lambda bad, g: (jnp.where(bad, jnp.nan, g), None))


def bad_run(**kwargs):
    """The gradient of the steps 2 and 7 is not finite; the loss is."""
    config = dataclasses.replace(CONFIG, epochs=2, **kwargs)
    return train.train(
        linear,
        zeros(),
        make_data(),
        config,
        transform=lambda p, bad: jax.tree.map(lambda x: bad_slope(x, bad), p),
        extra=jnp.array(False),
        refresh=lambda p, bad, step: step % 5 == 2,
    )


def test_a_gradient_that_is_not_finite_ends_the_run_or_is_skipped_and_counted():
    with pytest.raises(FloatingPointError, match="epoch 0 at step 2, and its gradient is not fin"):
        bad_run()
    found = bad_run(skip=True)
    assert [record.skipped for record in found.history] == [1, 1]
    assert np.isfinite(found.params["w"]).all() and np.any(found.params["w"] != 0)


def test_a_skipped_step_changes_nothing():
    before = train.train(linear, zeros(), make_data(), dataclasses.replace(CONFIG, epochs=1))
    config = dataclasses.replace(CONFIG, epochs=2, skip=True)
    found = train.train(
        linear,
        zeros(),
        make_data(),
        config,
        transform=lambda p, bad: jax.tree.map(lambda x: bad_slope(x, bad), p),
        extra=jnp.array(False),
        refresh=lambda p, bad, step: step >= 5,  # all of the second epoch
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found[0], before[0])
    assert found.history[1].skipped == 5 and np.isnan(found.history[1].train_loss)


def test_event_files_are_optional(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match="need tensorboardX.*pip install tensorboardX"):
        metrics.tensorboard(tmp_path)

    class Writer:
        lines = []

        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, name, value, step):
            self.lines.append((self.folder, name, value, step))

        def flush(self):
            pass

    monkeypatch.setitem(sys.modules, "tensorboardX", type(sys)("tensorboardX"))
    sys.modules["tensorboardX"].SummaryWriter = Writer
    write = metrics.tensorboard(tmp_path)
    for run in (0, 1):
        write(metrics.EpochRecord(4, 0.5, 0.25, 0.75, 2.0, run=run), None)
    assert (str(tmp_path / "run1"), "validation_accuracy", 0.75, 4) in Writer.lines
    assert len(Writer.lines) == 10
