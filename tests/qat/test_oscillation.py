"""Are oscillations those of the paper, and do they end?"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from quantjax import prune, qat
from quantjax.fake_quantized import fake_array
from quantjax.formats import IntFormat, apot
from quantjax.policy import Policy
from quantjax.spec import QuantSpec
from tests.qat.estimators import normal

W = jnp.array([[0.9, -0.2], [-1.4, 0.05], [0.3, 1.7], [-0.1, -2.6], [0.02, 0.4]])


def tree_of(w=W, weights="w3", estimator=None, scale=0.6):
    tree = qat.prepare({"kernel": w}, weights, estimator=estimator or qat.lsq())
    x = tree["kernel"]
    learned = {"scale": jnp.full_like(x.learned["scale"], scale)}
    return {"kernel": dataclasses.replace(x, learned=learned)}


@pytest.mark.parametrize("weights, half, top", [("w3", 0.0, 3.0), ("w2", 0.5, 1.5)])
def test_dampening_draws_to_the_middle_of_cells(weights, half, top):
    tree, w = tree_of(weights=weights), np.asarray(W)
    level = np.floor(w / 0.6) + half if half else np.round(w / 0.6)
    near = np.clip(level, -top, top) * 0.6
    gap = near - np.clip(w, -top * 0.6, top * 0.6)
    value, slope = jax.value_and_grad(qat.dampening)(tree)
    np.testing.assert_allclose(value, np.sum(gap**2), rtol=1e-5)
    np.testing.assert_allclose(slope["kernel"].value, -2 * gap, rtol=1e-4, atol=1e-6)
    assert not np.any(slope["kernel"].learned["scale"])
    assert np.any(np.abs(w) > top * 0.6) and np.any(gap)


def test_weights_are_frozen_as_algorithm_1_has_it():
    """Against NumPy, in float64, over 60 steps of noise; the scale moves as well."""
    tree = tree_of()
    optimizer = qat.freeze_oscillations(optax.sgd(1.0), optax.linear_schedule(0.4, 0.2, 60), 0.1)
    update = jax.jit(optimizer.update)
    state = optimizer.init(tree)
    rng = np.random.default_rng(0)
    w, s = np.asarray(W, np.float64), np.full((1, 2), 0.6)
    code = np.clip(np.round(w / s), -3, 3)
    turn, frequency, mean = np.zeros_like(w), np.zeros_like(w), code.copy()
    frozen, held = np.zeros(w.shape, bool), np.zeros_like(w)
    for i in range(60):
        gw, gs = 0.2 * rng.normal(size=w.shape), 0.005 * rng.normal(size=s.shape)
        x = tree["kernel"]
        gradient = {"kernel": dataclasses.replace(
            x, value=jnp.float32(gw), learned={"scale": jnp.float32(gs)})}  # fmt: skip
        updates, state = update(gradient, state, tree)
        tree = optax.apply_updates(tree, updates)
        if i == 30:  # a run goes on from what a file holds
            state = jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), state)

        w, s = np.where(frozen, w, w - gw), s - gs
        new = np.where(frozen, held, np.clip(np.round(w / s), -3, 3))
        change = np.sign(new - code)
        frequency = 0.9 * frequency + 0.1 * (turn * change == -1)
        turn = np.where(change != 0, change, turn)
        freezes = (frequency > 0.4 - 0.2 * i / 60) & ~frozen
        held = np.where(freezes, np.round(mean), held)
        frozen |= freezes
        mean = 0.9 * mean + 0.1 * new
        code = np.where(frozen, held, new)
        w = np.where(frozen, code * s, w)

        own = state.leaves["kernel"]
        np.testing.assert_array_equal(own.frozen, frozen)
        np.testing.assert_array_equal(own.code, code)
        np.testing.assert_allclose(own.frequency, frequency, atol=1e-6)
        np.testing.assert_allclose(tree["kernel"].value, w, atol=1e-5)
        np.testing.assert_allclose(fake_array(tree["kernel"]), code * s, atol=1e-5)
    assert 3 <= frozen.sum() < frozen.size


def test_what_is_frozen_is_no_gradient_to_the_optimizer():
    tree = tree_of()
    optimizer = qat.freeze_oscillations(optax.trace(0.9), 0.02)
    state = optimizer.init(tree)
    frozen = jnp.arange(10).reshape(5, 2) % 3 == 0
    leaves = {"kernel": state.leaves["kernel"]._replace(frozen=frozen)}
    _, after = optimizer.update(
        jax.tree.map(jnp.ones_like, tree), state._replace(leaves=leaves), tree
    )
    np.testing.assert_array_equal(after.inner.trace["kernel"].value, ~frozen)


@pytest.mark.parametrize("how", ["bare", "dampened", "frozen"])
def test_a_weight_between_two_levels_comes_to_rest(how):
    """The paper's toy: the best weight lies between two levels, so descent straight through the
    rounding turns round for ever. Beside it a pruned weight, and rates by label."""
    w = jnp.array([[0.35], [0.0]])
    tree = tree_of(w, scale=0.5)
    rates = {
        "weights": optax.sgd(0.05),
        "learned": optax.set_to_zero(),
        "fixed": optax.set_to_zero(),
    }
    masks = {"kernel": jnp.array([[True], [False]])}
    optimizer = prune.masked(optax.partition(rates, qat.labels), masks)
    if how == "frozen":
        optimizer = qat.freeze_oscillations(optimizer, 0.02)

    def loss(tree):
        best = jnp.sum((fake_array(tree["kernel"]) - 0.3) ** 2)
        return best + 0.9 * qat.dampening(tree) * (how == "dampened")

    @jax.jit
    def step(tree, state):
        updates, state = optimizer.update(jax.grad(loss)(tree), state, tree)
        return optax.apply_updates(tree, updates), state

    state, codes = optimizer.init(tree), []
    for _ in range(60):
        tree, state = step(tree, state)
        codes.append(int(np.round(tree["kernel"].value[0, 0] / 0.5)))
    assert not tree["kernel"].value[1, 0]
    turns = np.count_nonzero(np.diff(codes[-20:]))
    assert turns > 2 if how == "bare" else turns == 0


def test_bad_input():
    freeze = qat.freeze_oscillations
    for threshold, momentum in ((-0.1, 0.01), (0.02, 0.0), (0.02, 1.5)):
        with pytest.raises(ValueError, match=r"momentum must lie in \(0, 1\] and threshold"):
            freeze(optax.sgd(0.1), threshold, momentum)
    with pytest.raises(TypeError, match="expected an optax GradientTransformation"):
        freeze(optax.sgd, 0.02)
    optimizer = freeze(optax.sgd(0.1), 0.02)
    with pytest.raises(ValueError, match="no leaf of the parameters is FakeQuantized"):
        optimizer.init({"kernel": W})
    tree = tree_of()
    with pytest.raises(ValueError, match="update needs the parameters"):
        optimizer.update(tree, optimizer.init(tree))
    codebook = Policy([("kernel", QuantSpec(format=apot(3)))])
    other = {
        "DoReFaWeights rounds something": qat.prepare({"kernel": W}, "w3", estimator=qat.dorefa()),
        "those of integer codes, not of apot3": qat.prepare({"kernel": W}, codebook),
    }
    for why, tree in other.items():
        for refuses in (optimizer.init, qat.dampening):
            with pytest.raises(ValueError, match=f"^kernel: .*{why}"):
                refuses(tree)


def test_layers_under_given_scales_are_apart():
    w = normal(2, 4, 3)

    def tree(w, layers):
        spec = QuantSpec(format=IntFormat(3), block=(None, 1), stacked=layers)
        return qat.prepare({"kernel": w}, Policy([("kernel", spec)]))

    damped = sum(float(qat.dampening(tree(w[i], 0))) for i in range(2))
    np.testing.assert_allclose(qat.dampening(tree(w, 1)), damped, rtol=1e-5)
    state = qat.freeze_oscillations(optax.sgd(0.1), 0.02).init(tree(w, 1))
    assert state.leaves["kernel"].code.shape == (2, 4, 3)


def test_every_dtype_of_a_weight_that_is_rounded_itself():
    for estimator, weights in (
        (qat.bitnet(), "ternary"),
        (qat.n2uq(), "w2"),
        (qat.xnor(), "binary"),
    ):
        tree = qat.prepare({"kernel": W.astype(jnp.bfloat16)}, weights, estimator=estimator)
        qat.freeze_oscillations(optax.sgd(0.1), 0.1).init(tree)
        assert np.isfinite(qat.dampening(tree))
