"""Does an optimizer whose state is rounded between its steps do what the float one does?"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import quantjax as qj
from quantjax import prune, qat
from quantjax.qat import quantize_state
from quantjax.qat.dynamic_map import dynamic_map, linear_map
from quantjax.qat.moment import Moment, by_axes
from tests.counted import Counted
from tests.daily import daily

PARAMS = {"kernel": jnp.ones((9, 16)), "bias": jnp.ones(3)}  # 144 numbers: the last block is short
small = functools.partial(quantize_state, min_size=64, block=32)


def is_moment(x):
    return isinstance(x, Moment)


def moments(state):
    return [x for x in jax.tree.leaves(state, is_leaf=is_moment) if is_moment(x)]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def level_of(code: int, bits: int, signed: bool) -> float:
    """One code, read bit by bit: sign, zeros that count the exponent, a one, then the fraction. The
    two codes without a one are 0 and 1; the unsigned map has the sign's bit in its fraction."""
    word = f"{code:0{bits}b}"
    sign, tree = (word[0], word[1:]) if signed else (word[-1], word[:-1])
    if "1" not in tree:
        return 1.0 if sign == "1" else 0.0
    exponent = tree.index("1")
    fraction = tree[exponent + 1 :] + ("" if signed else sign)
    middle = (int(fraction or "0", 2) + 0.5) / 2 ** len(fraction)
    value = 10.0**-exponent * (0.1 + 0.9 * middle)
    return -value if signed and sign == "1" else value


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [8, 4, 3])
def test_levels_are_those_of_the_words(bits, signed):
    expected = sorted(level_of(code, bits, signed) for code in range(2**bits))
    format = dynamic_map(bits, signed=signed)
    np.testing.assert_allclose(format.grid, np.float32(expected), rtol=1e-6)
    assert format.bits == bits and format.max_level == 1.0 and format.has_zero
    assert linear_map(bits).lowest == 2.0**-bits and not linear_map(bits).has_zero


def nearest_distance(v, levels):
    return np.abs(v[..., None] - levels.astype(np.float64)).min(-1)


@pytest.mark.parametrize("bits", daily([8, 4], [8]))
def test_two_steps_of_adam(bits):
    """In NumPy: what is stored after a step is a nearest level of each block, and the next step is
    that of Adam on the stored values."""
    b1, b2, rate, eps = 0.9, 0.99, 0.1, 1e-8
    optimizer = small(optax.adam(rate, b1=b1, b2=b2, eps=eps), bits=bits)
    state = optimizer.init(PARAMS)
    g = {"kernel": normal(9, 16, seed=1), "bias": normal(3, seed=2)}
    m, v = np.zeros((9, 16)), np.zeros((9, 16))
    maps = dynamic_map(bits), dynamic_map(8, signed=False) if bits == 8 else linear_map(4)
    for t in (1, 2):
        m = b1 * m + (1 - b1) * g["kernel"].astype(np.float64)
        v = b2 * v + (1 - b2) * g["kernel"].astype(np.float64) ** 2
        step = -rate * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        updates, state = jax.jit(optimizer.update)(g, state, PARAMS)
        # Of float32: powers, a root and a quotient, a few roundings each.
        np.testing.assert_allclose(updates["kernel"], step, rtol=1e-5)
        adam = state.inner[0]
        stored = []
        for exact, moment, format in zip((m, v), (adam.mu, adam.nu), maps, strict=True):
            kept = moment["kernel"]
            assert kept.q.format == format and kept.q.scale.shape == (5,)
            rows = np.pad(exact.reshape(-1), (0, 16)).reshape(5, 32)
            scale = np.abs(rows).max(1, keepdims=True)
            got = np.pad(np.asarray(kept.array(), np.float64).reshape(-1), (0, 16)).reshape(5, 32)
            off = np.abs(got - rows) / scale
            valid = np.arange(160).reshape(5, 32) < 144
            # A level is off by its own distance alone, and one float32 rounding of each factor.
            assert np.all((off <= nearest_distance(rows / scale, format.grid) + 1e-6)[valid])
            stored.append(np.asarray(kept.array(), np.float64))
        m, v = stored
    assert not is_moment(state.inner[0].mu["bias"]) and state.step is None


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_scales_by_axes(dtype):
    """The definition in NumPy; and what it is for: an outlier keeps to its own row and column."""
    x = np.exp(2 * normal(6, 5, 4)).astype(np.float32)
    x[1], x[2, 3, 1] = 0, 1e4
    x = np.asarray(jnp.asarray(x, dtype), np.float32)
    scale = np.minimum(
        np.minimum(x.max((1, 2))[:, None, None], x.max((0, 2))[None, :, None]),
        x.max((0, 1))[None, None, :],
    )
    moment = by_axes(jnp.asarray(x, dtype), linear_map(4))
    got = np.asarray(moment.array().astype(jnp.float32))
    assert moment.array().dtype == dtype and [m.shape for m in moment.maxima] == [(6,), (5,), (4,)]
    # Half a step of 1/16, or up to the least level; then one rounding of the dtype.
    bound = scale / 16 * (1 + 1e-5) + 2.0**-8 * got
    assert np.all(np.abs(got - x) <= np.where(x < scale / 16, bound, bound / 2 + 2.0**-9 * got))
    assert not got[1].any()
    # Elsewhere the levels are as fine as without the outlier, where a block would have one in all.
    calm = np.delete(np.delete(np.delete(x, 2, 0), 3, 1), 1, 2)
    kept = np.delete(np.delete(np.delete(got, 2, 0), 3, 1), 1, 2)
    assert np.abs(kept - calm).max() <= calm.max() / 16 * 1.01 < x.max() / 160


def decoder(width: int = 128, layers: int = 4, vocabulary: int = 256):
    """The parameters of a small language model, by shape."""
    shapes = {
        "embedding": (vocabulary, width),
        "layers": {
            "qkv": (layers, width, 3 * width), "out": (layers, width, width),
            "up": (layers, width, 4 * width), "down": (layers, 4 * width, width),
            "norm": (layers, 2, width), "bias": (layers, 4 * width),
        },
        "norm": (width,),
    }  # fmt: skip
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    make = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    return jax.tree.map(make, shapes, is_leaf=is_shape)


def nbytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("bits, share", [(8, 0.30), (4, 0.16)])
def test_bytes_of_the_state(bits, share):
    params = decoder()
    whole = nbytes(jax.eval_shape(optax.adamw(1e-3).init, params))
    state = jax.eval_shape(quantize_state(optax.adamw(1e-3), bits=bits).init, params)
    large = [x for x in jax.tree.leaves(params) if x.size >= 4096]
    rest = sum(x.size for x in jax.tree.leaves(params) if x.size < 4096)
    size = sum(x.size for x in large)
    m = size * bits // 8 + size // (256 if bits == 8 else 128) * 4
    v = m if bits == 8 else size // 2 + sum(sum(x.shape) for x in large) * 4
    assert nbytes(state) == m + v + 2 * rest * 4 + 4
    assert nbytes(state) <= share * whole


def labelled(*optimizers):
    names = ("a", "b")
    return optax.partition(dict(zip(names, optimizers, strict=True)), {"kernel": "a", "bias": "b"})


# An optimizer by the wrapper of its parts; and how many arrays of the kernel's size its state has.
# The first ones have the wrapper around everything, the others within.
COMBINED = {
    "adam": (lambda q: q(optax.adam(1e-3)), 2),
    "4 bits": (lambda q: q(optax.adam(1e-3), bits=4), 2),
    "a key": (lambda q: q(optax.adam(1e-3), key=jax.random.key(0)), 2),
    "chain": (lambda q: q(optax.chain(optax.clip(1.0), optax.adamw(1e-3))), 2),
    "partition": (lambda q: q(labelled(optax.adam(1e-3), optax.sgd(1e-3))), 2),
    "hyperparameters": (lambda q: q(optax.inject_hyperparams(optax.adam)(1e-3)), 2),
    "a schedule": (lambda q: q(optax.lion(optax.linear_schedule(1e-3, 0, 9))), 1),
    "amsgrad": (lambda q: q(optax.amsgrad(1e-3)), 3),
    "in a chain": (lambda q: optax.chain(optax.clip(1.0), q(optax.adamw(1e-3))), 2),
    "in a partition": (lambda q: labelled(q(optax.adam(1e-3)), optax.sgd(1e-3)), 2),
    "in hyperparameters": (
        lambda q: optax.inject_hyperparams(lambda rate: q(optax.adam(rate)))(rate=1e-3), 2
    ),
    "in steps": (
        lambda q: optax.MultiSteps(q(optax.adam(1e-3)), 2).gradient_transformation(), 2
    ),
    "if finite": (lambda q: optax.apply_if_finite(q(optax.adam(1e-3)), 3), 2),
}  # fmt: skip


@pytest.mark.parametrize("name", daily(COMBINED, ["partition", "if finite"]))
def test_with_other_transformations(name):
    """Compiles once; where nothing is large enough, it is the float optimizer bit for bit; else
    the same direction, and counts and hyperparameters stay."""
    make, count = COMBINED[name]
    plain = make(lambda optimizer, **_: optimizer)
    off = make(functools.partial(quantize_state, min_size=10**6))
    on = make(small)
    g = {"kernel": normal(9, 16), "bias": normal(3)}

    def run(optimizer):
        update, state = Counted(optimizer.update), optimizer.init(PARAMS)
        for _ in range(2):
            updates, state = update(g, state, PARAMS)
        assert update.traces == 1
        return updates, state

    (expected, whole), (same, _), (got, state) = run(plain), run(off), run(on)
    jax.tree.map(np.testing.assert_array_equal, same, expected)
    assert len(moments(state)) == count
    np.testing.assert_array_equal(got["bias"], expected["bias"])
    # Adam's steps are of size 1e-3 whatever the gradient; 4 bits have the coarsest direction.
    assert np.abs(got["kernel"] - expected["kernel"]).mean() < 0.3e-3
    restored = jax.tree.map(lambda x: x.array() if is_moment(x) else x, state, is_leaf=is_moment)
    shapes = [x.shape for x in jax.tree.leaves(restored)]
    extra = [()] if name == "a key" else []
    assert sorted(shapes) == sorted([x.shape for x in jax.tree.leaves(whole)] + extra)


def test_the_weights_of_a_tree_with_an_estimator():
    """What optax.partition gives it of FakeQuantized leaves: their values. The whole tree, in which
    there are given scales too, is refused."""
    tree = qat.prepare(PARAMS, "w4", estimator=qat.lsq())
    rates = {"weights": small(optax.adamw(1e-3)), "learned": optax.adam(1e-4),
             "fixed": optax.set_to_zero()}  # fmt: skip
    optimizer = optax.partition(rates, qat.labels)
    state = optimizer.init(tree)
    updates, state = jax.jit(optimizer.update)(jax.tree.map(jnp.ones_like, tree), state, tree)
    assert [m.shape for m in moments(state)] == [(9, 16)] * 2
    assert float(jnp.abs(updates["kernel"].value).min()) > 0.5e-3
    plain = qat.prepare(PARAMS, "w4")
    with pytest.raises(ValueError, match=r"kernel \(int4\) is quantized.*qat.labels"):
        small(optax.adam(1e-3)).init(plain)


@pytest.mark.parametrize("bits", [8, 4])
def test_pruned_weights_stay_pruned(bits):
    masks = {"kernel": jnp.asarray(normal(9, 16) > 0)}
    optimizer = small(prune.masked(optax.adamw(1e-2), masks), bits=bits)
    params, state = PARAMS, optimizer.init(PARAMS)
    for seed in range(3):
        g = {"kernel": normal(9, 16, seed=seed), "bias": normal(3, seed=seed)}
        updates, state = optimizer.update(jax.tree.map(jnp.asarray, g), state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params["kernel"] != 0, masks["kernel"])


def test_dtypes_stay():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    plain = optax.adam(1e-3, mu_dtype=jnp.float32)
    optimizer = small(plain)
    state = optimizer.init(params)
    updates, after = jax.eval_shape(optimizer.update, params, state, params)
    expected, _ = jax.eval_shape(plain.update, params, plain.init(params), params)
    assert updates == expected
    for s in (state, after):
        assert [str(m.q.dtype) for m in moments(s)] == ["float32", "bfloat16"]
        assert jax.tree.structure(s) == jax.tree.structure(state)


def test_which_are_nonnegative_is_an_argument():
    seen = []
    optimizer = small(optax.adam(1e-3), nonnegative=lambda path: seen.append(path) or False)
    state = optimizer.init(PARAMS)
    assert seen == ["0/mu", "0/nu"]
    assert {str(m.q.format) for m in moments(state)} == {"dynamic8"}
    named_nu = small(optax.lion(1e-3)).init({"nu": jnp.ones((9, 16))})
    assert str(named_nu.inner[0].mu["nu"].q.format) == "dynamic8"  # the parameter's name, not ours


def test_letters_that_two_optimizers_use_are_told_apart():
    """v holds squares in Adafactor's state, and differences of gradients in Adan's; n squares."""
    adafactor = small(optax.adafactor(1e-3, min_dim_size_to_factor=1000)).init(PARAMS)
    assert {str(m.q.format) for m in moments(adafactor)} == {"udynamic8"}
    adan = small(optax.adan(1e-3)).init(PARAMS).inner[0]
    formats = {k: {str(m.q.format) for m in moments(getattr(adan, k))} for k in "mvn"}
    assert formats == {"m": {"dynamic8"}, "v": {"dynamic8"}, "n": {"udynamic8"}}


@functools.cache
def regression():
    """Noisy outputs of a network: parameters to start at, 120 batches drawn five times, a test."""
    rng = np.random.default_rng(0)

    def draw(*shape, by=1.0):
        return (by * rng.normal(size=shape)).astype(np.float32)

    def data(*shape):
        x = draw(*shape, 16)
        return x, np.tanh(x @ teacher) + draw(*shape, 32, by=0.3)

    teacher = draw(16, 32, by=1 / 4)
    start = {"in": draw(16, 64, by=1 / 4), "bias": np.zeros(64, np.float32),
             "out": draw(64, 32, by=1 / 8)}  # fmt: skip
    return start, data(5, 120, 32), data(512)


@functools.partial(jax.jit, static_argnames=("bits", "stochastic"))
def final_losses(start, batches, test, *, bits, stochastic=False):
    """Of a small network after 120 batches at a falling rate; five drawings of data at once."""
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 120))
    if bits:
        noisy = {"key": jax.random.key(1)} if stochastic else {}
        optimizer = quantize_state(optimizer, bits=bits, min_size=256, **noisy)

    def loss(p, x, y):
        return jnp.mean((jnp.tanh(x @ p["in"] + p["bias"]) @ p["out"] - y) ** 2)

    def step(carry, batch):
        p, state = carry
        updates, state = optimizer.update(jax.grad(loss)(p, *batch), state, p)
        return (optax.apply_updates(p, updates), state), None

    def one(batches):
        (params, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), batches)
        return loss(params, *test)

    return jax.vmap(one)(batches)


@pytest.mark.parametrize(
    "case",
    daily([(8, False), (4, False), (8, True), (4, True)], [(4, False)]),
)
def test_it_trains_as_the_float_optimizer_does(case):
    bits, stochastic = case
    floats = np.asarray(final_losses(*regression(), bits=None))
    got = np.asarray(final_losses(*regression(), bits=bits, stochastic=stochastic))
    assert floats.max() < 0.14  # 0.09 is the noise of the targets; at the start it is above 0.4
    # The batches are the only noise, and move the loss by 0.4 % alone; 4 bits cost 0.5 % to nearest
    # and 1.8 % with a noise of their own.
    allowed = floats.std(ddof=1) if bits == 8 else 0.02 * floats.mean()
    assert got.mean() - floats.mean() <= allowed


def test_stochastic_rounding_moves_a_sum_that_nearest_leaves_behind():
    """A sum of small terms beside a large one: once a step of the levels is more than two terms,
    the nearest level is the old one. The mean of 48 noisy ones is the sum."""
    first = jnp.zeros(64).at[0].set(1.0)
    rest = jnp.full(64, 4e-4).at[0].set(0.0)

    def total(key):
        optimizer = quantize_state(optax.trace(decay=1.0), min_size=1, key=key)
        _, state = optimizer.update(first, optimizer.init(first))
        step = lambda state, _: (optimizer.update(rest, state)[1], None)  # noqa: E731
        return jax.lax.scan(step, state, None, 200)[0].inner.trace.array()[1:]

    nearest = jax.jit(lambda: total(None))()
    noisy = np.asarray(jax.jit(total)(jax.random.key(3)), np.float64)
    assert np.all(nearest < 0.03)
    # 63 sums of 200 steps, each of variance at most 4e-4 times the levels' distance, 0.0028.
    assert abs(noisy.mean() - 0.08) < 4 * np.sqrt(200 * 4e-4 * 0.0028 / 63)


def test_a_run_goes_on_to_the_same_bits():
    optimizer = small(optax.adam(1e-3), key=jax.random.key(5))
    g = {"kernel": jnp.asarray(normal(9, 16)), "bias": jnp.zeros(3)}
    _, one = optimizer.update(g, optimizer.init(PARAMS), PARAMS)
    stored = jax.tree.map(np.asarray, one)
    (_, two), (_, again) = (optimizer.update(g, s, PARAMS) for s in (one, stored))
    jax.tree.map(np.testing.assert_array_equal, two, again)
    assert int(two.step) == 2
    codes = [moments(s)[0].q.qvalue for s in (one, optimizer.update(g, one, PARAMS)[1])]
    assert np.any(codes[0] != codes[1])


def test_a_gradient_that_is_not_finite_is_skipped_and_counted():
    optimizer = optax.apply_if_finite(small(optax.adam(1e-3)), max_consecutive_errors=5)
    bad = {"kernel": jnp.full((9, 16), jnp.nan), "bias": jnp.zeros(3)}
    _, before = optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS)
    updates, after = optimizer.update(bad, before, PARAMS)
    assert not np.any(updates["kernel"]) and int(after.total_notfinite) == 1
    jax.tree.map(np.testing.assert_array_equal, after.inner_state, before.inner_state)
    poisoned = small(optax.adam(1e-3)).update(bad, before.inner_state, PARAMS)[1]
    assert np.isnan(moments(poisoned)[0].array()).all()  # not hidden where nobody looks


def test_refusals():
    with pytest.raises(ValueError, match="bits must be 8 or 4, got 2"):
        quantize_state(optax.adam(1e-3), bits=2)
    with pytest.raises(ValueError, match="block must be a positive integer, got 0"):
        quantize_state(optax.adam(1e-3), block=0)
    with pytest.raises(TypeError, match="got MultiSteps.*the optimizer in it"):
        quantize_state(optax.MultiSteps(optax.adam(1e-3), 2))
    steps = optax.MultiSteps(optax.adam(1e-3), 2).gradient_transformation()
    with pytest.raises(ValueError, match="MultiSteps sums up gradients"):
        quantize_state(steps).init(PARAMS)
    with pytest.raises(ValueError, match="state of this optimizer is quantized"):
        small(small(optax.adam(1e-3))).init(PARAMS)
    with pytest.raises(ValueError, match=r"kernel \(int8\)"):
        small(optax.adam(1e-3)).init(qj.quantize(PARAMS, "w8"))
