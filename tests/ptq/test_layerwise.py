"""Layer by layer: each parameter is settled on the inputs that it will really see."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax import affine
from quantjax.ptq import Layerwise
from quantjax.ptq.matrix import on_grid
from tests.daily import daily


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@dataclasses.dataclass(frozen=True)
class Nearest:
    """Rounds to nearest, and tells `seen` what it was given."""

    paired: bool = True
    seen: dict = dataclasses.field(default_factory=dict, hash=False, compare=False, repr=False)

    def __call__(self, problem):
        self.seen[problem.name] = problem
        scales = affine.find_scales(problem.w.astype(jnp.float32), problem.spec)
        values = on_grid(problem.w_BOI, problem.cells(scales), problem.spec.format)
        return problem.stored(values, scales)


def mlp(params, x):
    return jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"]) @ params["b"]["kernel"]


MLP = {
    "a": {"kernel": normal(3, 4), "bias": normal(4, seed=1)},
    "b": {"kernel": normal(4, 2, seed=2)},
}
X = normal(16, 3, seed=3)


def calibrated(apply, params, batches, policy="w3", **options):
    solver = Nearest(options.pop("paired", True))
    method = Layerwise(policy, solver, options.pop("sequential", True))
    return qj.calibrate(apply, params, batches, method, **options), solver.seen


def test_rounding_layer_by_layer_is_rounding():
    got, _ = calibrated(mlp, MLP, [X], "w8")
    want = qj.quantize(MLP, "w8")
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("sequential", [True, False])
def test_inputs_are_those_of_the_quantized_layers_before(sequential):
    q, seen = calibrated(mlp, MLP, [X[:8], X[8:]], sequential=sequential)
    first = qj.dequantize(q)["a"]["kernel"]
    floats = np.tanh(np.float64(X @ MLP["a"]["kernel"] + MLP["a"]["bias"]))
    rounded = np.tanh(np.float64(X @ first + MLP["a"]["bias"]))
    x = rounded if sequential else floats
    moments = seen["b/kernel"].moments
    np.testing.assert_allclose(moments.h[0], x.T @ x / 16, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(moments.mean[0], x.mean(0), rtol=1e-4, atol=1e-5)
    if sequential:
        np.testing.assert_allclose(moments.cross[0], floats.T @ x / 16, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(moments.float_mean[0], floats.mean(0), rtol=1e-4, atol=1e-5)


def test_rounded_activations_are_what_later_layers_see():
    _, weights = calibrated(mlp, MLP, [X], "w8")
    _, both = calibrated(mlp, MLP, [X], "w8a2")
    a, b = (seen["b/kernel"].moments.h for seen in (weights, both))
    assert jnp.abs(a - b).max() > 0.01


def stacked(params, x):
    return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, params["kernel"])[0]


def test_stacked_layers_are_as_each_alone():
    w, x = normal(3, 4, 4), normal(8, 4, seed=1)
    got, seen = calibrated(stacked, {"kernel": w}, [x])
    assert sorted(seen) == [f"kernel/[{i}]" for i in range(3)]
    for i in range(3):
        alone = {"kernel": w[i]}
        one, _ = calibrated(lambda p, x: x @ p["kernel"], alone, [x])
        layer = jax.tree.map(lambda a, i=i: a[i], got["kernel"])
        jax.tree.map(np.testing.assert_array_equal, layer, one["kernel"])


def test_layers_that_an_index_takes_have_moments_of_their_own():
    w, x = normal(2, 4, 4), normal(8, 4, seed=1)

    def apply(p, x):
        return jnp.tanh(x @ p["kernel"][0]) @ p["kernel"][1]

    _, seen = calibrated(apply, {"kernel": w}, [x])
    h = seen["kernel"].moments.h
    hidden = np.tanh(np.float64(x @ w[0]))
    np.testing.assert_allclose(h[0], x.T @ x / 8, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(h[1], hidden.T @ hidden / 8, rtol=1e-4, atol=1e-5)


def test_a_parameter_used_twice_has_the_moments_of_both():
    w, x = normal(4, 4), normal(8, 4, seed=1)
    _, seen = calibrated(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"], {"w": w}, [x])
    hidden = np.tanh(np.float64(x @ w))
    both = (x.T @ x + hidden.T @ hidden) / 16
    np.testing.assert_allclose(seen["w"].moments.h[0], both, rtol=1e-4, atol=1e-5)


def recurrent(params, x_TNI):
    def step(h, x):
        h = jnp.tanh(x @ params["in"]["kernel"] + h @ params["hidden"]["kernel"])
        return h, h

    return jax.lax.scan(step, jnp.zeros((x_TNI.shape[1], 4)), x_TNI)[1]


def test_a_recurrent_layer_sees_every_step():
    params = {"in": {"kernel": normal(3, 4)}, "hidden": {"kernel": normal(4, 4, seed=1)}}
    x = normal(5, 2, 3, seed=2)
    _, seen = calibrated(recurrent, params, [x])
    assert seen["hidden/kernel"].moments.rows.tolist() == [10]
    states = np.concatenate([np.zeros((1, 2, 4)), recurrent(params, x)[:-1]]).reshape(10, 4)
    h = seen["hidden/kernel"].moments.h[0]
    np.testing.assert_allclose(h, states.T @ states / 10, rtol=1e-4, atol=1e-5)


def test_an_expert_that_no_token_reaches_is_named():
    def apply(p, x):
        return jax.lax.ragged_dot(x, p["kernel"], jnp.array([4, 0], jnp.int32))

    with pytest.warns(UserWarning, match=r"kernel \(matrix 1\): no sample"):
        q, _ = calibrated(apply, {"kernel": normal(2, 3, 4)}, [normal(4, 3)])
    assert np.isfinite(qj.dequantize(q)["kernel"]).all()


def test_a_table_that_is_only_looked_up_is_rounded():
    params = {"embedding": normal(5, 4), "kernel": normal(4, 2)}
    q, seen = calibrated(lambda p, i: p["embedding"][i] @ p["kernel"], params, [jnp.arange(3)])
    assert list(seen) == ["kernel"]
    want = qj.quantize(params, qj.preset("w3").resolve(params, ()))
    jax.tree.map(np.testing.assert_array_equal, q["embedding"], want["embedding"])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_activations_that_are_not_finite_are_named(bad):
    with pytest.raises(ValueError, match=r"a/kernel: batch 1: the activation holds NaN"):
        calibrated(mlp, MLP, [X, X.at[3, 1].set(bad)])


def test_weights_that_are_not_finite_are_named():
    params = {**MLP, "b": {**MLP["b"], "kernel": MLP["b"]["kernel"].at[0, 0].set(np.nan)}}
    with pytest.raises(ValueError, match=r"b/kernel: holds NaN or infinity"):
        calibrated(mlp, params, [X])


def test_one_sample_and_batches_of_two_lengths():
    q, seen = calibrated(mlp, MLP, [X[:1]])
    assert seen["b/kernel"].moments.rows.tolist() == [1]
    assert np.isfinite(mlp(qj.dequantize(q), X)).all()
    _, seen = calibrated(mlp, MLP, [X[:5], X[5:]])
    _, whole = calibrated(mlp, MLP, [X])
    a, b = (s["b/kernel"].moments.h for s in (seen, whole))
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_no_batches():
    with pytest.raises(ValueError, match="at least one batch"):
        calibrated(mlp, MLP, [])


@pytest.mark.parametrize("stop", daily([0, 1], [0]))
def test_a_run_that_was_stopped_goes_on_to_the_same_file(stop, tmp_path):
    class Stop(Exception):
        pass

    def on_batch(i, state):
        qj.save(tmp_path / "state.safetensors", state)
        if i == stop:
            raise Stop

    want, _ = calibrated(mlp, MLP, [X])
    with pytest.raises(Stop):
        calibrated(mlp, MLP, [X], on_batch=on_batch)
    state = qj.load(tmp_path / "state.safetensors")
    got, seen = calibrated(mlp, MLP, [X], state=state)
    assert len(seen) == 1 - stop  # what was finished is not done again
    for name, tree in (("want", want), ("got", got)):
        qj.save(tmp_path / name, tree)
    assert (tmp_path / "want").read_bytes() == (tmp_path / "got").read_bytes()


@pytest.fixture(scope="module")
def states():
    found = []
    calibrated(mlp, MLP, [X, X], on_batch=lambda i, state: found.append(state))
    return found


@pytest.mark.parametrize("what", ["parameters", "batches", "method"])
def test_a_state_of_something_else_is_refused(what, states):
    params = jax.tree.map(lambda a: a + 1, MLP) if what == "parameters" else MLP
    batches = [X, X + 1] if what == "batches" else [X, X]  # the last one counts too
    policy = "w4" if what == "method" else "w3"
    with pytest.raises(ValueError, match=f"state= is of another run: it differs in {what}\\. "):
        calibrated(mlp, params, batches, policy, state=states[-1])


def test_static_activation_scales_are_found_at_the_end():
    act = qj.QuantSpec(format=qj.IntFormat(8), block=qj.Granularity.TENSOR, static=True)
    policy = qj.Policy(otherwise=qj.QuantSpec(format=qj.IntFormat(8), act=act))
    q, _ = calibrated(mlp, MLP, [X], policy)
    assert q["b"]["kernel"].act_scale.shape == ()
    assert np.isfinite(qj.intercept(mlp)(q, X)).all()


def test_methods_that_quantize_refuse_what_is_quantized():
    method = qj.chain(Layerwise("w4", Nearest()), Layerwise("w4", Nearest()))
    with pytest.raises(ValueError, match="a/kernel is quantized already"):
        qj.calibrate(mlp, MLP, [X], method)


def test_a_chain_takes_methods():
    with pytest.raises(TypeError, match="expected methods"):
        qj.chain("w4")
