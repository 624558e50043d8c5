"""Does every estimator train, and is what it trained what is stored?"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import quantjax as qj
from quantjax import qat
from quantjax.fake_quantized import fake_array, is_quantized
from quantjax.spec import QuantSpec
from tests.counted import Counted
from tests.daily import daily
from tests.qat.estimators import CASES, PARAMS, X, mlp, prepared, spec_of, static

# Daily each estimator at its first width, and one at its last, whose levels are others.
WIDTHS = [(name, w) for name, case in CASES.items() for w in case.weights]
FIRST = [(name, case.weights[0]) for name, case in CASES.items()]
each = pytest.mark.parametrize("case", daily(WIDTHS, [*FIRST, ("lsq", "w1")]))
by_name = pytest.mark.parametrize("name", CASES)
# What they share is asked of one number that is learned, and of several a layer.
few = pytest.mark.parametrize("name", daily(CASES, ["lsq", "n2uq"]))
one = pytest.mark.parametrize("name", daily(CASES, ["lsq"]))
RUN = qj.intercept(mlp)
run = jax.jit(RUN)
TARGET = mlp(PARAMS, X)


def loss(tree, x=X, target=TARGET):
    return jnp.mean((RUN(tree, x) - target) ** 2)


OPTIMIZER = optax.partition(
    {"weights": optax.adam(1e-2), "learned": optax.adam(3e-3), "fixed": optax.set_to_zero()},
    qat.labels,
)


def seen(tree):
    """The weights as products see them."""
    leaf = lambda x: fake_array(x) if is_quantized(x) else x  # noqa: E731
    return jax.tree.map(leaf, tree, is_leaf=is_quantized)


@Counted
def step(tree, state):
    value, gradient = jax.value_and_grad(loss)(tree)
    updates, state = OPTIMIZER.update(gradient, state, tree)
    return optax.apply_updates(tree, updates), state, value, seen(tree)


def trained(tree, steps, state=None):
    """The tree after some steps, the state, and the losses."""
    state = OPTIMIZER.init(tree) if state is None else state
    losses = []
    for _ in range(steps):
        tree, state, value, _ = step(tree, state)
        losses.append(float(value))
    return tree, state, losses


@functools.cache
def after_steps(name, weights):
    return trained(prepared(CASES[name], weights), 3)[0]


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@each
def test_what_was_trained_is_what_is_stored(case, tmp_path):
    name, weights = case
    tree = after_steps(name, weights)
    stored = qat.finalize(tree)
    in_training = step(tree, OPTIMIZER.init(tree))[3]
    same(qj.dequantize(stored), in_training)
    same(qj.dequantize(jax.jit(qat.finalize)(tree)), in_training)
    qj.save(tmp_path / "a.safetensors", stored)
    same(qj.load(tmp_path / "a.safetensors"), stored)
    assert qj.summary(stored).totals.bits_per_weight < 32
    # The training pass sums floats, inference exact integers: 8 terms, each to 2^-24.
    np.testing.assert_allclose(run(stored, X), run(tree, X), rtol=1e-5, atol=1e-5)


@each
def test_it_learns(case):
    """Fits the float network's outputs: the rounded network gets nearer than it was."""
    name, weights = case
    tree = prepared(CASES[name], weights)
    _, _, losses = trained(tree, 200)
    assert np.mean(losses[-10:]) < 0.7 * losses[0]
    assert np.isfinite(losses).all()


@by_name
def test_what_is_learned_moves_and_has_a_gradient(name):
    case = CASES[name]
    start, now = prepared(case, case.weights[0]), after_steps(name, case.weights[0])
    for path in ("a", "b"):
        before, after = start[path]["kernel"], now[path]["kernel"]
        for field in ("learned", "act_learned"):
            for key, value in (getattr(before, field) or {}).items():
                assert not np.array_equal(value, getattr(after, field)[key]), (path, field, key)


@by_name
def test_the_second_step_compiles_nothing(name):
    case = CASES[name]
    tree, state, _ = trained(prepared(case, case.weights[0]), 1)
    compiled = step.traces
    trained(tree, 2, state)
    assert step.traces == compiled


@few
def test_dtypes_stay(name):
    case = CASES[name]
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), PARAMS)
    tree = prepared(case, case.weights[0], params=params, x=X.astype(jnp.bfloat16))
    summed = lambda t: RUN(t, X.astype(jnp.bfloat16)).astype(jnp.float32).sum()  # noqa: E731
    gradient = jax.eval_shape(jax.grad(summed), tree)
    kinds = [a.dtype for a in jax.tree.leaves(tree)]
    assert [a.dtype for a in jax.tree.leaves(gradient)] == kinds
    assert jax.eval_shape(fake_array, tree["a"]["kernel"]).dtype == jnp.bfloat16
    assert jax.eval_shape(qat.finalize, tree)["a"]["kernel"].dtype == jnp.bfloat16


@by_name
def test_a_run_goes_on_to_the_same_bits(name):
    case = CASES[name]
    tree = prepared(case, case.weights[0])
    whole, _, _ = trained(tree, 4)
    half, state, _ = trained(tree, 2)
    arrays, structure = jax.tree.flatten((half, state))
    half, state = jax.tree.unflatten(structure, [jnp.asarray(np.asarray(a)) for a in arrays])
    same(trained(half, 2, state)[0], whole)


STACKED = {"kernel": jnp.stack([PARAMS["a"]["kernel"][:, :6] * s for s in (1.0, 3.0)])}


def scanned(p, x):
    return jax.lax.scan(lambda h, k: (jax.nn.relu(h @ k), None), x, p["kernel"])[0]


@one
def test_layers_of_a_scan_learn_apart(name):
    case = CASES[name]

    def single(p, x):
        return jax.nn.relu(x @ p["kernel"])

    tree = prepared(case, case.weights[0], apply=scanned, params=STACKED)
    gradient = jax.jit(jax.grad(lambda t: jnp.sum(qj.intercept(scanned)(t, X) ** 2)))(tree)
    layer = lambda t, i: jax.tree.map(lambda a: a[i], t)  # noqa: E731
    run = qj.intercept(single)

    def by_hand(layers):
        return jnp.sum(run(layers[1], run(layers[0], X)) ** 2)

    layers = [{"kernel": layer(tree["kernel"], i)} for i in range(2)]
    for i, alone in enumerate(jax.jit(jax.grad(by_hand))(layers)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            layer(gradient["kernel"], i),
            alone["kernel"],
        )


@pytest.mark.parametrize("name", ["pact", "apot", "n2uq", "dorefa"])
def test_layers_that_nothing_calibrated_learn_apart_too(name):
    case = CASES[name]
    spec = dataclasses.replace(spec_of(case.weights[0]), act=case.act)
    found = qj.sites(scanned, STACKED, X)
    tree = qat.prepare(
        STACKED, qj.Policy([("kernel", spec)]), sites=found, estimator=case.estimator
    )
    for a in jax.tree.leaves(tree["kernel"].act_learned):
        assert a.shape[0] == 2
    run = qj.intercept(scanned)
    np.testing.assert_allclose(run(qat.finalize(tree), X), run(tree, X), rtol=1e-5, atol=1e-5)


def test_thresholds_of_layers_are_stored_and_served(tmp_path):
    """Several numbers a layer beside its codes: in a scan, and where layers are indexed."""

    def indexed(p, x):
        for i in range(2):
            x = jax.nn.relu(x @ p["kernel"][i])
        return x

    tree = prepared(CASES["n2uq"], "w2", apply=scanned, params=STACKED)
    widths = tree["kernel"].act_learned["widths"] * jnp.array([[0.5, 1.5, 1.0], [1.2, 0.6, 0.4]])
    learned = {**tree["kernel"].act_learned, "widths": widths}
    tree = {"kernel": dataclasses.replace(tree["kernel"], act_learned=learned)}
    qj.save(tmp_path / "a.safetensors", qat.finalize(tree))
    stored = qj.load(tmp_path / "a.safetensors")
    assert stored["kernel"].act_thresholds.shape == (2, 3)
    for apply in (scanned, indexed):
        run = qj.intercept(apply)
        np.testing.assert_allclose(run(stored, X), run(tree, X), rtol=1e-5, atol=1e-5)
    (site,) = {s.act: s for s in qj.intercept(scanned).report(stored, X).sites}.values()
    assert (site.act, site.lowering) == ("uint2 by thresholds, static", "int8 product")
    with pytest.raises(ValueError, match="kernel: like= holds thresholds of its activation"):
        qat.prepare(STACKED, like=stored)


def test_one_set_of_thresholds_serves_parts_and_layers():
    """Rows of a weight, and layers that share a scale, have the activation of the whole."""
    kernel = jnp.stack([PARAMS["a"]["kernel"][:, :6]] * 2)

    def rows(p, x):
        return x[:, :4] @ p["kernel"][:4]

    for apply, w in ((rows, kernel[0]), (scanned, kernel)):
        spec = QuantSpec(format=spec_of("w2").format, block=(None,) * w.ndim, act=static(2))
        like = qj.quantize({"kernel": w}, qj.Policy([("kernel", spec)]))
        like = {"kernel": dataclasses.replace(like["kernel"], act_scale=jnp.float32(0.5))}
        tree = qat.prepare({"kernel": w}, like=like, estimator=qat.n2uq())
        assert tree["kernel"].act_learned["widths"].shape == (3,)
        run = qj.intercept(apply)
        np.testing.assert_allclose(run(qat.finalize(tree), X), run(tree, X), rtol=1e-5, atol=1e-5)
