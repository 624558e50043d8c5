"""Do stages of a training stay one compiled step, and do they hold what they say?"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import quantjax as qj
from quantjax import qat
from quantjax.fake_quantized import fake_array
from quantjax.spec import QuantSpec
from tests.qat.estimators import CASES, PARAMS, X, mlp, normal, prepared

RUN = qj.intercept(mlp)
W = normal(5, 2)


def leaf_of(weights, estimator=None):
    return qat.prepare({"kernel": W}, weights, estimator=estimator)


def test_rounding_sets_in_at_a_step_of_one_compiled_function():
    """Of weights and activations, to the products' last bits."""
    tree = prepared(CASES["lsq"], "w2")
    traced = []

    def floats(t):
        traced.append(t)
        return mlp(qat.unrounded(t), X)

    late = qat.stages((0, floats), (3, lambda t: RUN(t, X)))
    compiled = jax.jit(late)
    for step, wanted in ((0, mlp(PARAMS, X)), (2, mlp(PARAMS, X)), (3, late(3, tree))):
        np.testing.assert_allclose(compiled(step, tree), wanted, rtol=1e-5, atol=1e-6)
    assert len(traced) == 1
    assert np.abs(compiled(9, tree) - mlp(PARAMS, X)).max() > 0.1
    np.testing.assert_array_equal(late(2, tree), mlp(PARAMS, X))  # outside jit too


@pytest.mark.parametrize("weights, half, top", [("w2", 0.5, 1.5), ("w3", 0.0, 3.0)])
def test_bits_fall_between_the_same_outermost_levels(weights, half, top):
    """Half-integer levels reach to 2^(b-1) - 1/2, the others to 2^(b-1) - 1."""
    tree = leaf_of(weights, qat.lsq())
    wide = qat.with_bits(tree, 6)["kernel"]
    high = 31.5 if half else 31.0
    step = np.asarray(tree["kernel"].learned["scale"]) * top / high
    v = np.asarray(W) / step
    level = np.floor(v) + half if half else np.round(v)
    np.testing.assert_allclose(fake_array(wide), np.clip(level, -high, high) * step, rtol=1e-5)
    slope = jax.grad(lambda t: jnp.sum(fake_array(qat.with_bits(t, 6)["kernel"]) ** 2))(tree)
    assert np.all(slope["kernel"].learned["scale"] != 0)


def test_bits_of_activations_and_given_scales():
    tree = prepared(CASES["lsq"], "w4")
    wide = qat.with_bits(tree, 8, act_bits=8)["a"]["kernel"]
    assert str(wide) == "FakeQuantized(int8, shape=(6, 8), dtype=float32, act=uint8)"
    np.testing.assert_allclose(
        wide.act_learned["scale"], tree["a"]["kernel"].act_learned["scale"] * 15 / 255, rtol=1e-6
    )
    given = qat.with_bits(leaf_of("w4"), 8)["kernel"]
    np.testing.assert_allclose(given.scale, leaf_of("w4")["kernel"].scale * 7 / 127, rtol=1e-6)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)


def test_statistics_of_batches_stay_from_a_step_on():
    net = Net()
    variables = jax.jit(net.init, static_argnames="train")(jax.random.key(0), X, train=True)

    def learning(params, stats, x):
        y, new = net.apply(
            {"params": params, "batch_stats": stats}, x, train=True, mutable="batch_stats"
        )
        return jnp.mean(y**2), new["batch_stats"]

    traced = []

    def frozen(params, stats, x):
        traced.append(x)
        y = net.apply({"params": params, "batch_stats": stats}, x, train=False)
        return jnp.mean(y**2), stats

    loss = jax.jit(jax.value_and_grad(qat.stages((0, learning), (2, frozen)), 1, has_aux=True))
    stats, seen = variables["batch_stats"], []
    for step in range(4):
        (_, stats), _ = loss(step, variables["params"], stats, X + step)
        seen.append(np.asarray(jax.tree.leaves(stats)[0]))
    assert np.all(seen[0] != seen[1])
    np.testing.assert_array_equal(seen[1], seen[3])
    assert len(traced) == 1


def test_ranges_stay_from_a_step_on_and_weights_learn_on():
    tree = leaf_of("w3", qat.lsq())
    rates = {
        "weights": optax.adamw(1e-2),
        "learned": optax.adamw(qat.until(optax.linear_schedule(1e-2, 1e-3, 4), 2)),
        "fixed": optax.set_to_zero(),
    }
    optimizer = optax.partition(rates, qat.labels)

    @jax.jit
    def step(tree, state):
        slope = jax.grad(lambda t: jnp.sum((fake_array(t["kernel"]) - 0.1) ** 2))(tree)
        updates, state = optimizer.update(slope, state, tree)
        return optax.apply_updates(tree, updates), state

    state, scales, values = optimizer.init(tree), [], []
    for _ in range(4):
        tree, state = step(tree, state)
        scales.append(np.asarray(tree["kernel"].learned["scale"]))
        values.append(np.asarray(tree["kernel"].value))
    assert np.all(scales[0] != scales[1]) and np.all(values[2] != values[3])
    np.testing.assert_array_equal(scales[1], scales[3])


def test_bad_input():
    for parts in ((), ((1, abs),), ((0, abs), (0, abs)), ((0, abs), (5, abs), (3, abs))):
        with pytest.raises(ValueError, match="stages: first steps must ascend from 0"):
            qat.stages(*parts)
    case = CASES["apot"]
    with pytest.raises(ValueError, match="a/kernel: with_bits: expected an integer format, got ap"):
        qat.with_bits(prepared(case, case.weights[0]), 4)
    with pytest.raises(ValueError, match=r"kernel: binary_connect is for IntFormat\(1 bits"):
        qat.with_bits(leaf_of("binary", qat.binary_connect()), 4)
    spec = QuantSpec(format=qj.IntFormat(4), symmetric=False, observer=qj.minmax())
    with pytest.raises(ValueError, match="kernel: with_bits: a zero point"):
        qat.with_bits(leaf_of(qj.Policy([("kernel", spec)])), 8)
    with pytest.raises(ValueError, match=r"a/kernel: with_bits: other bits learn .*widths': \(15,"):
        qat.with_bits(prepared(CASES["n2uq"], "w2"), 4, act_bits=4)
    with pytest.raises(ValueError, match="kernel: IntFormat: one narrow bit"):
        qat.with_bits(leaf_of("w4"), 1)
