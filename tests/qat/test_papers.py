"""Are value and gradient of each estimator those that its paper writes?

The references are written anew from the papers, one column (one output) at a time, with
w + stop_gradient(q - w) for straight-through and the derivatives of all else by JAX."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import quantjax as qj
from quantjax import formats, qat
from quantjax.fake_quantized import fake_array
from tests.daily import daily
from tests.qat.estimators import normal, spec_of, static

fake = jax.jit(fake_array)  # one program, where eager calls would be one for each operation


@jax.jit
def gradient(leaf, g):
    return jax.grad(lambda x: jnp.sum(g * fake_array(x)))(leaf)


W = jnp.array([[0.9, -0.2], [-1.4, 0.05], [0.3, 1.7], [-0.1, -0.6], [0.02, 0.4]])
G = normal(5, 2, seed=9)


def straight(x, y):
    """y, as if it were x."""
    return x + lax.stop_gradient(y - x)


def scaled(s, factor):
    return straight(s * factor, s)


def lsq(w, learned, bits=3):
    high = 2 ** (bits - 1) - 1
    s = scaled(learned["scale"][0], 1 / np.sqrt(len(w) * high))
    v = jnp.clip(w / s, -high, high)
    return straight(v, jnp.round(v)) * s


def seq(w, learned, k=4):
    """ParetoQ's equation 7, its alpha k / 2 of our steps; three levels lie around zero."""
    shift = 0.5 if k % 2 == 0 else 0.0
    alpha = scaled(learned["scale"][0], 1 / np.sqrt(len(w) * (k - 1) / 2)) * k / 2
    v = w / alpha * k / 2 - shift
    nearest = jnp.clip(jnp.round(v), -(k - 1) / 2 - shift, (k - 1) / 2 - shift)
    level = (straight(v, nearest) + shift) * 2 / k
    # Where w is clipped the paper keeps the outermost level; the authors' code clips at 0.99 alpha.
    outermost = (k - 1) / k * jnp.sign(w)
    inside = jnp.abs(w) <= 0.99 * lax.stop_gradient(alpha)
    return jnp.where(inside, level, outermost) * alpha


def elastic_sign(w, learned):
    """Of 1 bit, alpha half of our step: dL/dalpha = sum g sign(w) / sqrt(n / 2) of ours."""
    alpha = scaled(learned["scale"][0], 1 / np.sqrt(len(w) / 2)) / 2
    inside = jnp.abs(w) <= lax.stop_gradient(alpha)
    return alpha * jnp.sign(w) + jnp.where(inside, w - lax.stop_gradient(w), 0)


def dorefa(w, learned, bits=2):
    n = 2**bits - 1
    t = jnp.tanh(w)
    v = t / (2 * jnp.abs(t).max()) + 0.5
    return 2 * straight(v, jnp.round(v * n) / n) - 1


def one_bit_dorefa(w, learned):
    return straight(w, jnp.abs(w).mean() * jnp.sign(w))


def binary_connect(w, learned):
    return straight(w, jnp.sign(w))


def xnor(w, learned):
    return jnp.abs(w).mean() * straight(jnp.clip(w, -1, 1), jnp.sign(w))


def ir_net(w, learned):
    v = (w - w.mean()) / jnp.sqrt(((w - w.mean()) ** 2).mean())
    t = 0.1 * 100 ** learned.get("progress", 0.0)
    soft = jnp.maximum(1 / t, 1) * jnp.tanh(t * v)  # whose derivative is k t (1 - tanh^2)
    size = lax.stop_gradient(2 ** jnp.round(jnp.log2(jnp.abs(v).mean())))
    return size * straight(soft, jnp.sign(v))


def twn(w, learned):
    kept = jnp.abs(w) > 0.7 * jnp.abs(w).mean()
    alpha = jnp.abs(w * kept).sum() / kept.sum()
    return straight(w, alpha * jnp.sign(w) * kept)


def bitnet(w, learned):
    gamma = jnp.abs(w).mean()
    return straight(w, gamma * jnp.clip(jnp.round(w / gamma), -1, 1))


def nearest(u, levels):
    return jnp.float32(levels)[jnp.argmin(jnp.abs(u[..., None] - jnp.float32(levels)), -1)]


def apot(w, learned):
    """Of 4 bits. The authors' code does not clip the gradient of weights."""
    alpha = learned["alpha"][0]
    v = (w - lax.stop_gradient(w.mean())) / lax.stop_gradient(w.std())
    u = jnp.clip(v / alpha, -1, 1)
    levels = np.array([0, 1, 2, 3, 4, 6, 8, 10]) / 10
    clipped = lax.stop_gradient(jnp.where(jnp.abs(v) > alpha, 1, 0))
    beyond = clipped * (v - lax.stop_gradient(v))
    return alpha * straight(u, jnp.sign(u) * nearest(jnp.abs(u), levels)) + beyond


def n2uq(w, learned, bits=2):
    gamma = lax.stop_gradient((2**bits - 1) / 2 ** (bits - 1) * jnp.abs(w).mean())
    n = (2**bits - 1) / 2
    q = gamma * (jnp.round((jnp.clip(w / gamma, -1, 1) + 1) * n) / n - 1)
    return straight(w / gamma, q)


PAPERS = {
    "lsq": (qat.lsq(), "w3", lsq),
    "paretoq 2 bits": (qat.paretoq(), "w2", seq),
    "paretoq 1 bit": (qat.paretoq(), "binary", elastic_sign),
    "paretoq ternary": (qat.paretoq(), "ternary", functools.partial(seq, k=3)),
    "dorefa": (qat.dorefa(), "w2", dorefa),
    "dorefa 1 bit": (qat.dorefa(), "w1", one_bit_dorefa),
    "binary_connect": (qat.binary_connect(), "binary", binary_connect),
    "xnor": (qat.xnor(), "binary", xnor),
    "ir_net": (qat.ir_net(), "binary", ir_net),
    "apot": (qat.apot(), "apot 4 bits", apot),
    "n2uq": (qat.n2uq(), "w2", n2uq),
    "twn": (qat.twn(), "ternary", twn),
    "bitnet": (qat.bitnet(), "ternary", bitnet),
}


def leaf_of(estimator, weights):
    spec = spec_of(weights)
    tree = qat.prepare({"kernel": W}, qj.Policy([("kernel", spec)]), estimator=estimator)
    return tree["kernel"]


@pytest.mark.parametrize(("name", "progress"), [*((n, None) for n in PAPERS), ("ir_net", 0.7)])
def test_weights_and_their_gradients(name, progress):
    estimator, weights, reference = PAPERS[name]
    leaf = leaf_of(estimator, weights)
    if progress is not None:
        leaf = qat.at(leaf, progress)
    if name == "apot":  # of 5 weights none lies 3 deviations away
        leaf = dataclasses.replace(leaf, learned={"alpha": leaf.learned["alpha"] * 0.4})
    values, got = fake(leaf), gradient(leaf, G)

    @jax.jit
    def expected(w, learned, g):
        def loss(w, learned):
            y = reference(w, learned)
            return jnp.sum(g * y), y

        (_, y), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(w, learned)
        return y, *gradients

    for column in range(W.shape[1]):
        learned = {k: a[:, column] for k, a in leaf.learned.items()}
        if progress is not None:
            learned["progress"] = jnp.float32(progress)
        y, by_w, by_learned = expected(W[:, column], learned, G[:, column])
        np.testing.assert_allclose(values[:, column], y, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got.value[:, column], by_w, rtol=1e-4, atol=1e-5)
        for key in leaf.learned:
            np.testing.assert_allclose(
                got.learned[key][:, column], by_learned[key], rtol=1e-4, atol=1e-5
            )


def test_trained_ternary():
    leaf = leaf_of(qat.ttq(), "trained ternary")
    w, g = np.asarray(W), np.asarray(G)
    bound = 0.05 * np.abs(w).max()
    up, down = w > bound, w < -bound
    positive, negative = w[up].mean(), -w[down].mean()
    want = np.where(up, positive, np.where(down, -negative, 0))
    np.testing.assert_allclose(fake(leaf), want, rtol=1e-6)
    got = gradient(leaf, G)
    np.testing.assert_allclose(got.learned["positive"], g[up].sum(), rtol=1e-5)
    np.testing.assert_allclose(got.learned["negative"], -g[down].sum(), rtol=1e-5)
    slope = np.where(up, positive, np.where(down, negative, 1))
    np.testing.assert_allclose(got.value, g * slope, rtol=1e-5)


X = jnp.array([[-0.4, 0.3, 1.1, 2.6], [0.9, 5.0, 0.05, 1.9]])
GX = normal(2, 4, seed=8)


def lsq_activation(x, learned, bits=3):
    high = 2**bits - 1
    s = scaled(learned["scale"], 1 / np.sqrt(x.shape[1] * high))
    v = jnp.clip(x / s, 0, high)
    return straight(v, jnp.round(v)) * s


def lsq_plus_activation(x, learned, bits=3):
    """Equation 3, beta at a multiple of s; its gradient to s holds beta too."""
    high = 2**bits - 1
    s = scaled(learned["scale"], 1 / np.sqrt(x.shape[1] * high))
    zero = straight(-learned["offset"] / s, jnp.round(-learned["offset"] / s))
    v = x / s + zero
    clipped = straight(jnp.clip(v, 0, high), jnp.round(jnp.clip(v, 0, high)))
    return (clipped - zero) * s


def pact(x, learned, bits=3):
    bound, n = learned["bound"], 2**bits - 1
    y = jnp.where(x < bound, jnp.maximum(x, 0), bound)
    return straight(y, jnp.round(y * n / bound) * bound / n)


def dorefa_activation(x, learned, bits=3):
    n = 2**bits - 1
    y = jnp.clip(x, 0, 1)
    return straight(y, jnp.round(y * n) / n)


def apot_activation(x, learned):
    u = jnp.clip(x / learned["alpha"], 0, 1)
    return learned["alpha"] * straight(u, nearest(u, np.array([0, 1, 2, 3, 4, 6, 8, 10]) / 10))


def n2uq_activation(x, learned):
    """Cell by cell, as the paper's figures have it: of 2 bits three slopes, none beyond."""
    u, low, heights, codes = x * learned["input"], learned["start"], 0.0, 0.0
    for i in range(3):
        a = learned["widths"][i]
        codes = codes + jnp.where(u > low + a / 2, 1.0, 0.0)
        inside = (u > low) & (u < low + a)
        heights = jnp.where(inside, i + (u - low) / a, heights)
        low = low + a
    heights = heights * 2 / 3
    return straight(heights, codes * 2 / 3) * learned["output"]


CELLS = {"input": 0.5, "start": 0.1, "widths": [0.3, 0.8, 0.5], "output": 2.0}
ACTIVATIONS = {
    "lsq": (qat.lsq(), lsq_activation, {"scale": 0.31}),
    "lsq_plus": (qat.lsq_plus(), lsq_plus_activation, {"scale": 0.31, "offset": -0.7}),
    "pact": (qat.pact(), pact, {"bound": 2.2}),
    "dorefa": (qat.dorefa(), dorefa_activation, {}),
    "apot": (qat.apot(), apot_activation, {"alpha": 2.2}),
    "n2uq": (qat.n2uq(), n2uq_activation, CELLS),
}
SPECS = {
    "lsq_plus": static(3, symmetric=False),
    "apot": static(3, format=formats.apot(3, signed=False)),
    "n2uq": static(2),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_their_gradients(name):
    estimator, reference, learned = ACTIVATIONS[name]
    learned = {k: jnp.float32(v) for k, v in learned.items()}
    act = SPECS.get(name, static(3))

    def ours(x, learned):
        return estimator.activations(x, learned, act, [1], None)

    (value, got), (expected, want) = (
        jax.jit(
            lambda x, p, f=f: (f(x, p), jax.grad(lambda *a: jnp.sum(GX * f(*a)), (0, 1))(x, p))
        )(X, learned)
        for f in (ours, reference)
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def only_grows(learned):
    """Of descent both ways: it leads no further below zero, and one way out."""
    for name, (down, up) in learned.items():
        assert np.isfinite(down).all() and np.isfinite(up).all(), name
        assert (down <= 0).all() and (up <= 0).all(), name
        assert (down != 0).any() or (up != 0).any(), name


BELOW = {"lsq": "w3", "paretoq": "w2", "ttq": "trained ternary", "apot": "apot 4 bits"}


@pytest.mark.parametrize("name", BELOW)
def test_what_is_below_zero_is_kept_above_and_grows_again(name):
    leaf = leaf_of(getattr(qat, name)(), BELOW[name])
    leaf = dataclasses.replace(leaf, learned={k: -a for k, a in leaf.learned.items()})
    values = fake(leaf)
    assert np.isfinite(values).all()
    np.testing.assert_array_equal(qj.dequantize(qat.finalize({"kernel": leaf}))["kernel"], values)
    toward = np.sign(W) if name != "apot" else np.sign(W - np.mean(W, 0))
    down, up = (gradient(leaf, s * toward).learned for s in (1, -1))
    only_grows({k: (down[k], up[k]) for k in down})


@pytest.mark.parametrize("name", ["lsq", "pact", "apot", "n2uq"])
def test_what_is_below_zero_of_an_activation_too(name):
    estimator, _, learned = ACTIVATIONS[name]
    # Of what n2uq learns the start may be anywhere, and what scales the input is asked alone.
    keys = [k for k in learned if k not in ("start", "input", "widths")]
    below = {k: jnp.float32(v) * (-1 if k in keys else 1) for k, v in learned.items()}
    act = SPECS.get(name, static(3))

    @jax.jit
    def total(p, sign):
        y = estimator.activations(X, p, act, [1], None)
        return sign * jnp.sum(y), y

    (down, y), (up, _) = (jax.grad(total, has_aux=True)(below, sign) for sign in (1.0, -1.0))
    assert np.isfinite(y).all()
    only_grows({k: (down[k], up[k]) for k in keys})


@pytest.mark.parametrize("weights", ["w1", "w2", "w8"])
def test_a_block_of_zeros_has_the_gradient_of_the_others(weights):
    """A channel that starts at zero, or was pruned, must neither be NaN nor stay there."""
    w = W.at[:, 1].set(0)
    leaf = qat.prepare({"kernel": w}, weights, estimator=qat.dorefa())["kernel"]
    got = gradient(leaf, G).value
    np.testing.assert_array_equal(got[:, 1], G[:, 1])
    assert np.isfinite(got).all() and np.any(got[:, 0] != 0)


FLAT = {"apot": "apot 4 bits", "n2uq": "w2", "ir_net": "binary", "xnor": "binary", "lsq": "w2"}
SOME = [("apot", 0.3), ("n2uq", 0.0), ("ir_net", 0.3), ("xnor", 0.0)]


@pytest.mark.parametrize("case", daily(itertools.product(FLAT, (0.0, 0.3)), SOME))
def test_a_block_of_equal_weights_trains_as_others_do(case):
    """Nothing to divide by, so gradients explode or vanish unless an estimator sees to it. Descent
    on |w - target|^2 brings it to where a block of random weights comes."""
    name, block = case
    w = W.at[:, 0].set(block)
    leaf = qat.prepare({"kernel": w}, qj.Policy([("kernel", spec_of(FLAT[name]))]),
                       estimator=getattr(qat, name)())["kernel"]  # fmt: skip
    if name == "apot":
        leaf = dataclasses.replace(leaf, learned={"alpha": leaf.learned["alpha"] * 0.4})
    target = jnp.array([1.0, -1.0, 1.0, 1.0, -1.0])[:, None]

    @jax.jit
    def step(leaf):
        slope = jax.grad(lambda x: jnp.mean((fake_array(x) - target) ** 2))(leaf)
        return jax.tree.map(lambda a, g: a - 0.05 * g, leaf, slope), slope.value

    for _ in range(200):
        leaf, slope = step(leaf)
        assert np.max(np.abs(slope)) < 20
    flat, other = np.mean((fake(leaf) - target) ** 2, 0)
    assert flat < 0.5 and flat < other + 0.3


@pytest.mark.parametrize("name", ["apot", "ir_net"])
def test_a_block_of_one_weight_is_refused(name):
    policy = qj.Policy([("kernel", dataclasses.replace(spec_of(FLAT[name]), block=(1, 1)))])
    with pytest.raises(ValueError, match="kernel: .* is one weight"):
        qat.prepare({"kernel": W}, policy, estimator=getattr(qat, name)())


def test_a_zero_point_stays_a_code():
    """The offset may lead anywhere; what is trained with is what is stored."""
    act = SPECS["lsq_plus"]
    spec = dataclasses.replace(spec_of("w3"), act=act)
    like = qj.calibrate(lambda p, x: x @ p["kernel"], {"kernel": W}, [X[:, :1] * jnp.ones(5)],
                        qj.Policy([("kernel", spec)]))  # fmt: skip
    leaf = qat.prepare({"kernel": W}, like=like, estimator=qat.lsq_plus())["kernel"]
    run, x = qj.intercept(lambda p, x: x @ p["kernel"]), normal(6, 5)
    for offset in (9.0, -9.0):
        moved = {**leaf.act_learned, "offset": jnp.float32(offset)}
        tree = {"kernel": dataclasses.replace(leaf, act_learned=moved)}
        stored = qat.finalize(tree)
        assert stored["kernel"].act_zero_point in (0, 7)
        np.testing.assert_allclose(run(stored, x), run(tree, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["dorefa", "paretoq", "lsq"])
def test_scales_that_an_estimator_would_drop_are_refused(name):
    for fields in ({"symmetric": False}, {"scale_format": formats.FloatFormat(4, 3)}):
        spec = dataclasses.replace(spec_of("w4"), **fields)
        with pytest.raises(ValueError, match="kernel: .*Weights has float scales of a symmetric"):
            policy = qj.Policy([("kernel", spec)])
            qat.prepare({"kernel": W}, policy, estimator=getattr(qat, name)())


def test_the_gradient_of_a_bound_is_summed_in_float32():
    x, bound = jnp.full(10_000, 3, jnp.bfloat16), {"bound": jnp.float32(2)}
    total = lambda p: jnp.sum(qat.pact().activations(x, p, static(3), [0], None), dtype=jnp.float32)  # noqa: E731
    assert jax.grad(total)(bound)["bound"] == 10_000


def test_zeros_of_a_rectifier_are_no_ties():
    """Half a gradient at the edge of a cell is none of the papers'."""
    x = jnp.zeros(32)
    y = lambda x, p: jnp.sum(qat.n2uq().activations(x, p, static(2), [0], None))  # noqa: E731
    cells = {k: jnp.float32(v) for k, v in CELLS.items()} | {"start": jnp.float32(0)}
    assert jax.grad(y, 1)(x, cells)["start"] == 0
    for estimator, learned in ((qat.dorefa(), {}), (qat.pact(), {"bound": jnp.float32(2)})):
        y = lambda x, e=estimator, p=learned: jnp.sum(e.activations(x, p, static(3), [0], None))  # noqa: E731
        np.testing.assert_array_equal(jax.grad(y)(x), 1)
