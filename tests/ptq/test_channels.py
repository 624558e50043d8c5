"""AWQ, SmoothQuant and low-rank correction: each does what it is for, against slow references."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import quantjax as qj
from quantjax import affine, ptq
from quantjax.blocks import sizes
from quantjax.formats import Codebook, IntFormat, e2m1, e4m3
from quantjax.interpret import intercept
from quantjax.ptq.awq import AWQ, channel_scales, clipped, search
from quantjax.ptq.low_rank import low_rank_matrix
from quantjax.ptq.matrix import MatrixForm
from quantjax.spec import QuantSpec
from tests.daily import daily

SEEDS = range(5)
FORM = MatrixForm((), (1,), (0,))  # a kernel (I, O)
INT4 = QuantSpec(format=IntFormat(4), block=(None, 1))


def inputs(seed: int, n: int, rows: int = 256, large: int = 0, by: float = 30.0) -> np.ndarray:
    """Correlated inputs; `large` of the channels are larger."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(rows, n)) @ (np.eye(n) + 0.5 * rng.normal(size=(n, n)) / n**0.5)
    mixed[:, rng.permutation(n)[:large]] *= by
    return mixed.astype(np.float32)


def kernel(seed: int, i: int = 32, o: int = 24) -> np.ndarray:
    return np.random.default_rng(100 + seed).normal(size=(i, o)).astype(np.float32)


# One program for each, where eager calls would be one for each operation.
find_scales = jax.jit(affine.find_scales, static_argnames="spec")
fake = jax.jit(affine.fake_quantize_array, static_argnames="spec")


def second_moment(x: np.ndarray) -> jax.Array:
    return jnp.asarray((x.astype(np.float64).T @ x / len(x))[None], jnp.float32)


def error(v: jax.Array, w: np.ndarray, x: np.ndarray) -> float:
    """Mean squared error of the outputs, in float64."""
    return float(np.mean((x.astype(np.float64) @ (np.asarray(v, np.float64) - w)) ** 2))


def dense(p, x):
    return x @ p["kernel"]


def solved(method, w, x, apply=dense):
    q = qj.calibrate(apply, {"kernel": jnp.asarray(w)}, [jnp.asarray(x)], method)
    return q, np.asarray(qj.dequantize(q)["kernel"])


def rounded(w: np.ndarray, spec: QuantSpec) -> jax.Array:
    x = jnp.asarray(w)
    return fake(x, find_scales(x, spec), spec=spec)


def slow_search(w_IO: np.ndarray, x: np.ndarray, group: int, points: int = 20) -> tuple:
    """AWQ's search for integer levels -7 ... 7, by its definition, in float64."""
    w, x, groups = w_IO.astype(np.float64), x.astype(np.float64), len(w_IO) // group

    def absmax(w):
        return np.abs(w.reshape(groups, group, -1)).max(1, keepdims=True)

    relative = np.abs(w).reshape(groups, group, -1) / absmax(w)
    mean_w, mean_x = relative.reshape(w.shape).mean(1), np.abs(x).mean(0)
    tried = [np.ones(len(w))]
    for r in np.arange(points) / points:
        s = mean_x**r / (mean_w ** (1 - r) + 1e-4)
        tried.append(s / np.sqrt(s.max() * s.min()))
    best = None
    for s in tried:
        scaled = (w * s[:, None]).reshape(groups, group, -1)
        step = absmax(scaled.reshape(w.shape)) / 7
        v = (np.round(scaled / step).clip(-7, 7) * step).reshape(w.shape) / s[:, None]
        lost = np.mean((x @ (v - w)) ** 2)
        best = (lost, s) if best is None or lost < best[0] else best
    return best


@pytest.mark.parametrize("group", daily([8, 32], [8]))
def test_the_search_of_awq_is_that_of_its_definition(group):
    w, x = kernel(0), inputs(0, 32, large=1)
    spec = QuantSpec(format=IntFormat(4), block=(group, 1))
    magnitude = jnp.asarray(np.abs(x).mean(0)[None])
    s_LC = search(jnp.asarray(w), magnitude, second_moment(x), form=FORM, spec=spec)
    lost, s = slow_search(w, x, group)
    v = np.asarray(rounded(w * np.asarray(s_LC).T, spec)) / np.asarray(s_LC).T
    np.testing.assert_allclose(s_LC[0], s, rtol=1e-4)
    np.testing.assert_allclose(error(v, w, x), lost, rtol=1e-2)  # codes on a tie may differ


@pytest.mark.parametrize("seed", daily(SEEDS, [0]))
def test_awq_helps_where_an_input_channel_is_large(seed):
    """Against rounding with the range of largest magnitude, and with the range of least error."""
    w, x = kernel(seed), inputs(seed, 32, large=1)
    policy = qj.Policy(otherwise=dataclasses.replace(INT4, block=(16, 1)))
    q, v = solved(ptq.awq(policy), w, x)
    assert q["kernel"].input_scale.shape == (32, 1) and q["kernel"].scale.shape == (2, 24)
    lost = error(v, w, x)
    for observer in (qj.absmax(), qj.mse()):
        plain = rounded(w, dataclasses.replace(INT4, block=(16, 1), observer=observer))
        assert lost < 0.5 * error(plain, w, x)
    _, unclipped = solved(ptq.awq(policy, clip=False), w, x)
    assert lost <= error(unclipped, w, x)


SPECS = {
    "int4": INT4,
    "int2 half, mse": QuantSpec(
        format=IntFormat(2, levels=qj.formats.Levels.HALF), block=(8, 1), observer=qj.mse()
    ),
    "asymmetric": QuantSpec(
        format=IntFormat(3), block=(12, 1), symmetric=False, observer=qj.minmax()
    ),
    "tensor": QuantSpec(format=IntFormat(4), block=(None, None)),
    "nvfp4": QuantSpec(format=e2m1, block=(16, 1), scale_format=e4m3),
    "learned": QuantSpec(format=Codebook.learned(3), block=(None, 1)),
    "tiles": QuantSpec(format=IntFormat(4), block=(8, 4)),
}


@pytest.mark.parametrize("name", daily(SPECS, ["int4", "learned"]))
def test_clipping_lowers_the_error_of_every_block(name):
    """By hand: the error of each block's own inputs, against the ranges of the observer; never more
    over all blocks than those, cross terms between blocks included."""
    spec, w, x = SPECS[name], jnp.asarray(kernel(1)), inputs(1, 32, large=2)
    h = second_moment(x)
    found = clipped(w, h, form=FORM, spec=spec)
    plain = find_scales(w, spec)
    v, u = (fake(w, s, spec=spec) for s in (found, plain))
    assert error(v, w, x) <= error(u, w, x) * (1 + 1e-5)
    if name == "learned":
        return
    rows, _ = sizes(w.shape, spec.block_shape)

    def of_blocks(v):
        e = np.asarray(v, np.float64) - np.asarray(w)
        own = np.kron(np.eye(-(-32 // rows)), np.ones((rows, rows)))[:32, :32]
        each = e * ((np.asarray(h[0], np.float64) * own) @ e)
        return [each[a : a + rows].sum() for a in range(0, 32, rows)]

    assert all(a <= b * (1 + 1e-4) for a, b in zip(of_blocks(v), of_blocks(u), strict=True))
    assert error(v, w, x) < error(u, w, x)


def test_channels_that_were_never_seen_keep_their_weights():
    m = jnp.array([[1.0, 0.0, 4.0]])
    s = channel_scales(m, jnp.array([[0.3, 0.3, 0.3]]))
    assert s.shape == (21, 1, 3) and bool(jnp.isfinite(s).all()) and float(s.min()) > 0
    np.testing.assert_allclose(s[-1], 1)
    zero = channel_scales(jnp.zeros((1, 3)), jnp.zeros((1, 3)))
    assert bool(jnp.isfinite(zero).all()) and float(zero.min()) > 0


@pytest.mark.parametrize("seed", daily(SEEDS, [0]))
def test_smoothquant_makes_8_bit_activations_better(seed):
    """With outliers in a few channels of the activation, run in integers: static and dynamic."""
    w, x = kernel(seed), inputs(seed, 32, large=2, by=50)
    exact = x.astype(np.float64) @ w
    run = jax.jit(intercept(dense))

    def lost(q):
        return float(np.mean((np.asarray(run(q, x), np.float64) - exact) ** 2))

    plain = qj.quantize({"kernel": w}, "w8a8")
    half, _ = solved(ptq.smoothquant("w8a8"), w, x)
    found, _ = solved(ptq.smoothquant("w8a8", alpha=None), w, x)
    (site,) = intercept(dense, strict=True).report(half, x).sites
    assert site.lowering == "int8 product; input scaled"
    assert lost(half) < 0.5 * lost(plain)
    assert lost(found) < 0.5 * lost(plain) and lost(found) < 1.05 * lost(half)
    static = [qj.calibrate(dense, q, [x], observer=qj.absmax()) for q in (plain, half, found)]
    assert static[1]["kernel"].act_scale is not None
    plain, half, found = map(lost, static)
    assert half < 0.2 * plain and found < 1.2 * half  # alpha was found for one scale a row


def test_smoothing_needs_activations():
    with pytest.raises(ValueError, match="kernel: SmoothQuant makes activations fit few bits"):
        solved(ptq.smoothquant("w8"), kernel(0), inputs(0, 32))
    with pytest.raises(ValueError, match="kernel: alpha is searched for integer activations"):
        fp8 = QuantSpec(format=e4m3, act=QuantSpec(format=e4m3))
        policy = qj.Policy(otherwise=fp8)
        solved(ptq.smoothquant(policy, alpha=None), kernel(0), inputs(0, 32))
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\]"):
        ptq.smoothquant("w8a8", alpha=1.5)
    with pytest.raises(ValueError, match="points must be 1 or more"):
        ptq.awq("w4", points=0)


@pytest.mark.parametrize("seed", daily(SEEDS, [0]))
def test_a_low_rank_term_takes_error_back(seed):
    """Below rounding alone, and, as inputs are correlated, below the plain SVD of the error."""
    w, x = kernel(seed), inputs(seed, 32, large=3, by=5)
    policy = qj.Policy(otherwise=dataclasses.replace(INT4, format=IntFormat(3)))
    q, v = solved(ptq.low_rank(policy, rank=4), w, x)
    _, plain = solved(ptq.low_rank(policy, rank=4, weighted=False), w, x)
    alone = rounded(w, dataclasses.replace(INT4, format=IntFormat(3)))
    assert error(v, w, x) < 0.95 * error(plain, w, x) < error(alone, w, x)
    assert error(v, w, x) < 0.7 * error(alone, w, x)
    assert q["kernel"].nbytes == q["kernel"].bare.nbytes + 4 * (32 + 24) * 2
    _, whole = solved(ptq.low_rank(policy, rank=99, dtype=jnp.float32), w, x)
    np.testing.assert_allclose(whole, w, atol=1e-4)


def test_the_low_rank_term_is_the_best_there_is():
    """Against the SVD of E H^(1/2) in float64: the error that is left is its smaller values."""
    e, x = kernel(0).T, inputs(0, 32, large=2)
    h = second_moment(x)[0]
    left, right, ok = low_rank_matrix(jnp.asarray(e), h, rank=5)
    values, vectors = np.linalg.eigh(np.float64(h))
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    rest = np.float64(e) - np.float64(right) @ np.float64(left).T
    best = np.linalg.svd(np.float64(e) @ root, compute_uv=False)[5:]
    assert bool(ok)
    np.testing.assert_allclose(np.linalg.norm(rest @ root), np.linalg.norm(best), rtol=2e-3)


def test_singular_and_bad_moments():
    """Two equal inputs and one that is never seen; and what can not be factored at all."""
    w, x = kernel(0), inputs(0, 32)
    x[:, 1], x[:, 2] = x[:, 0], 0
    for method in (ptq.low_rank("w3", rank=4), ptq.awq("w3"), ptq.smoothquant("w3a8")):
        q, v = solved(method, w, x)
        assert np.isfinite(v).all()
        assert error(v, w, x) < error(0 * w, w, x)
    bad = jnp.full((32, 32), jnp.nan)
    left, right, ok = low_rank_matrix(jnp.asarray(w.T), bad, rank=32)
    assert not bool(ok)
    np.testing.assert_allclose(right @ left.T, w.T, atol=1e-4)


def grouped(p, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, p["kernel"], (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=2
    )


def image(p, x):
    return lax.conv_general_dilated(
        x, p["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def layers(p, x):
    return lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["kernel"])[0]


def experts(p, x):
    return lax.ragged_dot(x, p["kernel"], jnp.array([100, 0, 156], jnp.int32))


def heads(p, x):
    return jnp.einsum("bhd,hdo->bo", x.reshape(-1, 4, 8), p["kernel"])


MODELS = {
    "convolution": (image, (3, 3, 8, 12), (4, 6, 6, 8)),
    "groups": (grouped, (3, 3, 4, 12), (4, 6, 6, 8)),
    "layers": (layers, (3, 32, 32), (256, 32)),
    "experts": (experts, (3, 32, 16), (256, 32)),
    "heads": (heads, (4, 8, 16), (256, 32)),
}
METHODS = {
    "awq": lambda: ("w4", ptq.awq("w4")),
    "smoothquant": lambda: ("w8a8", ptq.smoothquant("w8a8", alpha=None)),
    "low rank of awq": lambda: ("w3", ptq.low_rank(ptq.awq("w3", clip=False), rank=3)),
}


DAILY = {"convolution awq"}
PAIRS = [f"{model} {method}" for model in MODELS for method in METHODS]


@pytest.mark.parametrize("pair", daily(PAIRS, DAILY))
@pytest.mark.filterwarnings("ignore:.*no sample came")
def test_every_kind_of_product(pair):
    """Scaled per channel, by layer and by expert, and nearer to the floats than plain rounding;
    the leaf runs under intercept, and comes back from a file."""
    model, _, name = pair.partition(" ")
    apply, shape, x_shape = MODELS[model]
    rng = np.random.default_rng(0)
    w = rng.normal(size=shape) / np.prod(shape[-3:-1]) ** 0.5
    x = rng.normal(size=x_shape)
    x[..., 3] *= 20
    params, x = {"kernel": jnp.asarray(w, jnp.float32)}, jnp.asarray(x, jnp.float32)
    policy, method = METHODS[name]()
    q = qj.calibrate(apply, params, [x], method)
    plain = qj.quantize(params, policy, sites=qj.sites(apply, params, x))
    exact = jax.jit(apply)(params, x)
    run = jax.jit(intercept(apply, strict=True))
    got, base = (float(jnp.linalg.norm(run(tree, x) - exact)) for tree in (q, plain))
    assert got < base
    leaf = q["kernel"]
    channels = {"convolution": (1, 1, 8, 1), "groups": (1, 1, 4, 1), "heads": (4, 8, 1)}
    if model != "experts":  # one of them is never reached, and rounded as it is
        assert leaf.input_scale.shape == channels.get(model, (3, 32, 1))


@pytest.mark.parametrize("name", daily(METHODS, {"awq"}))
def test_a_second_parameter_of_one_shape_compiles_nothing(name):
    _, method = METHODS[name]()

    def two(p, x):
        return jnp.tanh(x @ p["a"]) @ p["b"]

    params = {n: jnp.asarray(kernel(i, 16, 16)) for i, n in enumerate("ab")}
    qj.calibrate(two, params, [jnp.asarray(inputs(0, 16))], method)
    before = search._cache_size(), clipped._cache_size()
    qj.calibrate(two, params, [jnp.asarray(inputs(1, 16))], method)
    assert before == (search._cache_size(), clipped._cache_size())


@functools.cache
def bfloat16_leaf():
    w = jnp.asarray(kernel(0), jnp.bfloat16)
    return qj.calibrate(dense, {"kernel": w}, [jnp.asarray(inputs(0, 32))], ptq.awq("w4"))["kernel"]


def test_the_dtype_of_the_parameter_stays(tmp_path):
    q = bfloat16_leaf()
    assert q.dtype == jnp.bfloat16 and AWQ() == AWQ() and hash(AWQ()) == hash(AWQ())
    qj.save(tmp_path / "q", {"kernel": q})
    back = qj.load(tmp_path / "q")["kernel"]
    np.testing.assert_array_equal(qj.dequantize(back), qj.dequantize(q))


def gated(p, x):
    """A norm's gain, two products of its output, their product, and one more."""
    h = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True)) * p["gain"]
    return (jnp.tanh(h @ p["gate"]) * (h @ p["up"])) @ p["down"]


def gated_params(seed: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    gain = np.ones(32, np.float32)
    gain[3] = 30
    weights = {n: kernel(seed + i, 32, 32) / 6 for i, n in enumerate(("gate", "up", "down"))}
    weights["up"][:, 5] *= 20
    return {k: jnp.asarray(v) for k, v in ({"gain": gain} | weights).items()} | {
        "down": jnp.asarray(weights["down"] * (1 + rng.random((32, 1), np.float32)))
    }


FOLDING = {
    "awq": (lambda fold: ptq.awq("w4", fold=fold), "w4", 1.0),
    "smoothquant": (lambda fold: ptq.smoothquant("w8a8", fold=fold), "w8a8", 0.7),
    "smoothquant, searched": (
        lambda fold: ptq.smoothquant("w8a8", alpha=None, fold=fold),
        "w8a8",
        0.7,
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("seed", daily(SEEDS, [SEEDS[0]]))
@pytest.mark.parametrize("name", daily(FOLDING, ["awq"]))
def test_scales_move_into_the_parameters_before(name, seed):
    """Into the gain for the two products that share its output, into `up` for the last; then no
    leaf holds a scale. Better than rounding, and near to where each product has a scale of its own,
    which two products of one input may want to differ."""
    make, policy, share = FOLDING[name]
    params, x = gated_params(seed), jnp.asarray(inputs(seed, 32))
    exact, run = gated(params, x), jax.jit(intercept(gated))

    def lost(q):
        return float(jnp.mean((run(q, x) - exact) ** 2))

    q = qj.calibrate(gated, params, [x], make(True))
    assert all(q[n].is_bare for n in ("gate", "up", "down"))
    assert float(jnp.abs(q["gain"] / params["gain"] - 1).max()) > 0.1
    kept = qj.calibrate(gated, params, [x], make(False))
    assert kept["gate"].input_scale is not None
    assert lost(q) < share * lost(qj.quantize(params, policy, sites=qj.sites(gated, params, x)))
    assert lost(q) < 3 * lost(kept)


def test_a_shared_scale_is_that_of_both_weights_together():
    """SmoothQuant's maximum over the weights of all products of an input."""
    params, x = gated_params(0), jnp.asarray(inputs(0, 32))
    q = qj.calibrate(gated, params, [x], ptq.smoothquant("w8a8"))
    h = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True)) * params["gain"]
    w = jnp.maximum(*(jnp.abs(params[n]).max(1) for n in ("gate", "up")))
    s = jnp.sqrt(jnp.abs(h).max(0) / w)
    np.testing.assert_allclose(q["gain"] * s, params["gain"], rtol=1e-4)


def test_a_search_that_was_done_is_not_done_again():
    """A run goes on from a saved state to the same bits, the scales of the groups among it."""
    params, x, states = gated_params(1), jnp.asarray(inputs(1, 32)), []
    note = lambda i, state: states.append(jax.tree.map(lambda a: a, state))  # noqa: E731
    q = qj.calibrate(gated, params, [x], ptq.awq("w4"), on_batch=note)
    again = qj.calibrate(gated, params, [x], ptq.awq("w4"), state=states[1])
    jax.tree.map(np.testing.assert_array_equal, q, again)
