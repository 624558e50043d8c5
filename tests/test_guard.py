"""Does the guard refuse quantized parameters, and change nothing else?"""

import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import quantjax as qj
from quantjax import qat
from quantjax.qat import guard, refuse_quantized


@pytest.fixture
def params():
    key = jax.random.key(0)
    return {"params": {"head": {"kernel": jax.random.normal(key, (8, 4)), "bias": jnp.zeros(4)}}}


def test_a_bare_optimizer_accepts_a_quantized_tree(params):
    """The reason for the guard. If this fails, optax refuses by itself and the guard can go."""
    q = qj.quantize(params, "w4")
    state = optax.adam(1e-3).init(q)
    assert isinstance(state[0].mu["params"]["head"]["kernel"], qj.QTensor)


@pytest.mark.parametrize("preset", ["w8", "w4", "nvfp4"])
def test_the_guard_refuses(params, preset):
    q = qj.quantize(params, preset)
    form = q["params"]["head"]["kernel"].format
    with pytest.raises(ValueError, match=rf"head/kernel \({form}\).*fake_quantize in the loss"):
        guard(optax.adam(1e-3)).init(q)


def test_the_guard_refuses_at_trace_time(params):
    with pytest.raises(ValueError, match="head/kernel"):
        jax.eval_shape(guard(optax.adam(1e-3)).init, qj.quantize(params, "w8"))


def test_boxed_and_nested_paths_are_named():
    q = qj.quantize({"kernel": jnp.ones((8, 4))}, "nvfp4")["kernel"]
    boxed = {"params": {"layer": {"kernel": nn.Partitioned(q, ("a", "b"))}}}
    with pytest.raises(ValueError, match=r"quantized: layer/kernel \(e2m1\)\."):
        refuse_quantized(boxed)
    with pytest.raises(ValueError, match=r"^train: .* 0/w/1 \(e2m1\)"):
        refuse_quantized([{"w": (jnp.ones(2), q)}], "train")


def test_many_are_counted():
    q = qj.quantize({str(i): {"kernel": jnp.ones((2, 2))} for i in range(9)}, "w8")
    with pytest.raises(ValueError, match=r"3/kernel \(int8\), 4/kernel \(int8\) and 4 more"):
        refuse_quantized(q)


@pytest.mark.parametrize(
    "make",
    [
        lambda: optax.sgd(0.1, momentum=0.9),
        lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)),
        lambda: optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
        lambda: optax.lbfgs(linesearch=None),
        lambda: optax.GradientTransformation(*optax.scale(-0.1)),
    ],
)
def test_otherwise_it_is_the_same_optimizer(params, make):
    bare, guarded = make(), guard(make())
    assert type(guarded) is type(bare)
    states = bare.init(params), guarded.init(params)
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    new = []
    for optimizer, state in zip((bare, guarded), states, strict=True):
        for _ in range(2):
            updates, state = jax.jit(optimizer.update)(params, state, params)
        new.append((updates, state))
    jax.tree.map(np.testing.assert_array_equal, *new)


def test_extra_arguments_arrive(params):
    def update(updates, state, params=None, *, value, **extra):
        return jax.tree.map(lambda u: u * value, updates), state

    optimizer = guard(optax.GradientTransformationExtraArgs(lambda p: (), update))
    assert isinstance(optimizer, optax.GradientTransformationExtraArgs)
    chained = optax.chain(optimizer, optax.identity())
    updates, _ = chained.update(params, chained.init(params), params, value=jnp.float32(0.0))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))


def test_integer_leaves_pass(params):
    tree = params | {"step": jnp.int32(0), "mask": jnp.ones(3, bool), "none": None}
    guard(optax.sgd(0.1)).init(tree)


def test_quantized_leaves_can_be_frozen_beside_trained_ones(params):
    tree = qj.quantize(params, "w4")
    trains = jax.tree.map(
        lambda x: not isinstance(x, qj.QTensor), tree, is_leaf=lambda x: isinstance(x, qj.QTensor)
    )
    optax.masked(guard(optax.adam(1e-3)), trains).init(tree)


def test_what_is_no_optimizer_is_refused():
    for wrong in (optax.adam, optax.MultiSteps(optax.sgd(0.1), 2), None):
        with pytest.raises(TypeError, match="expected an optax GradientTransformation"):
            guard(wrong)


def test_importing_quantjax_does_not_import_optax():
    code = "import sys, quantjax, quantjax.qat; sys.exit('optax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_gradient_that_is_not_finite_is_refused_by_name():
    """What estimators learn is named too; the other choice is to skip the step and count."""
    tree = qat.prepare({"a": {"kernel": jnp.ones((3, 2))}}, "w2", estimator=qat.lsq())
    tree["b"] = jnp.ones(2, jnp.bfloat16)
    tree["count"] = jnp.int32(3)
    qat.refuse_not_finite(tree)
    bad = jax.tree.map(lambda x: x * jnp.nan if x.shape == (1, 2) else x, tree)
    bad["b"] = bad["b"].at[0].set(jnp.inf)
    message = r"^gradient: not finite: a/kernel/learned/scale \(2 of 2.*\), b \(1 of 2 numbers\)\.$"
    with pytest.raises(FloatingPointError, match=message):
        qat.refuse_not_finite(bad)
    with pytest.raises(ValueError, match="not known under jit"):
        jax.jit(qat.refuse_not_finite)(bad)


def test_such_a_gradient_is_skipped_and_counted_with_what_is_learned():
    tree = qat.prepare({"kernel": jnp.ones((3, 2))}, "w2", estimator=qat.lsq())
    rates = {"weights": optax.adam(0.1), "learned": optax.adam(0.1), "fixed": optax.set_to_zero()}
    inner = qat.freeze_oscillations(optax.partition(rates, qat.labels), 0.02)
    optimizer = optax.apply_if_finite(inner, max_consecutive_errors=3)
    bad = jax.tree.map(lambda x: x * jnp.nan, tree)
    state = optimizer.init(tree)
    updates, after = optimizer.update(bad, state, tree)
    assert int(after.total_notfinite) == 1
    jax.tree.map(np.testing.assert_array_equal, optax.apply_updates(tree, updates), tree)
    jax.tree.map(np.testing.assert_array_equal, after.inner_state, state.inner_state)
