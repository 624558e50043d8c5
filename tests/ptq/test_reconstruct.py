"""Block reconstruction: less error than rounding, learned activation scales, and going on."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax import ptq
from quantjax.affine import Scales
from quantjax.formats import IntFormat
from quantjax.interpret.pieces import Pieces
from quantjax.interpret.program import Leaf
from quantjax.ops import fake_activation
from quantjax.ptq.fisher import output_weights, own_labels
from quantjax.ptq.learned_activation import LearnedActivation, learned_step
from quantjax.spec import Granularity, QuantSpec
from tests.daily import daily, dealt

SEEDS = range(5)
BLOCKS = ("block*",)


def network(p: Any, x: jax.Array) -> jax.Array:
    """Residual blocks of two layers each, and a head."""
    for name in sorted(set(p) - {"head"}):
        y = jax.nn.relu(x @ p[name]["in"])
        x = jax.nn.relu(x + y @ p[name]["out"])
    return x @ p["head"]


def variables(seed: int, n: int = 12) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def matrix(i: int, o: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=(i, o)) / np.sqrt(i), jnp.float32)

    blocks = {f"block{i}": {"in": matrix(n, n), "out": matrix(n, n)} for i in (0, 1)}
    return {**blocks, "head": matrix(n, 3)}


def samples(seed: int, rows: int = 64, n: int = 12) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (rows, n))


def error(params: Any, q: Any, x: jax.Array) -> float:
    return float(jnp.mean((qj.intercept(network)(q, x) - network(params, x)) ** 2))


@pytest.mark.parametrize(
    "blocks, seed", dealt(daily([BLOCKS, (), ("**",)], [BLOCKS]), daily(SEEDS, [0]))
)
def test_gives_what_the_float_network_gives_nearer_than_rounding(
    blocks: tuple[str, ...], seed: int
) -> None:
    """On samples that were not seen, for five networks."""
    method = ptq.brecq("w2", blocks=blocks, steps=200, loss=None)
    params, x = variables(seed), samples(seed, 128)
    q = qj.calibrate(network, params, [x[:64], x[64:]], method)
    unseen = samples(100 + seed)
    assert error(params, q, unseen) < 0.8 * error(params, qj.quantize(params, "w2"), unseen)


@pytest.mark.full
@pytest.mark.parametrize("finished", daily([1, 2], [2]))
def test_goes_on_to_the_same_bits_after_each_block(finished: int, tmp_path: Any) -> None:
    params, x = variables(0), [samples(0), samples(1)]
    method = ptq.qdrop("w4a4", blocks=BLOCKS, steps=10, loss=own_labels)
    run = functools.partial(qj.calibrate, network, params, x, method)
    states: list[Any] = []
    whole = run(on_batch=lambda i, state: states.append(state))
    assert len(states) == 3
    path, later = tmp_path / "state.safetensors", []
    qj.save(path, states[finished - 1])
    again = run(state=qj.load(path), on_batch=lambda i, s: later.append(s))
    assert len(later) == 3 - finished
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.full
def test_learns_the_scales_of_activations() -> None:
    """All static, and better than those of the range with the same way of rounding weights."""
    params, x = variables(1), [samples(0), samples(1)]
    learned = qj.calibrate(
        network, params, x, ptq.qdrop("w8a3", blocks=BLOCKS, steps=300, loss=None)
    )
    leaf = learned["block1"]["in"]
    assert leaf.act.static and leaf.act_scale.shape == ()
    static = QuantSpec(
        format=IntFormat(8),
        act=QuantSpec(format=IntFormat(3), block=Granularity.TENSOR, static=True),
    )
    policy = qj.Policy([("**", static)])
    plain = qj.calibrate(network, params, x, policy)
    assert leaf.act_scale != plain["block1"]["in"].act_scale
    unseen = samples(9)
    assert error(params, learned, unseen) < error(params, plain, unseen)


@pytest.mark.parametrize("zero", [None, 3.0])
def test_the_step_of_an_activation_learns_by_its_formula(zero: float | None) -> None:
    format = IntFormat(3, signed=zero is None)
    x, s = jnp.array([-4.0, -0.35, 0.0, 0.2, 0.8, 9.0]), jnp.float32(0.3)
    point = None if zero is None else jnp.float32(zero)
    spec = QuantSpec(format=format, block=Granularity.TENSOR, symmetric=zero is None)
    expected = fake_activation(x, spec, Scales(s, point), [0])
    # One rounding of v + (level - v), of the size of a level.
    np.testing.assert_allclose(learned_step(x, s, point, format), expected, atol=4 * 2**-23 * 3)

    z = zero or 0.0
    low, high = format.qmin - z, format.qmax - z
    v = np.asarray(x, np.float64) / 0.3
    level = np.clip(np.round(v), low, high)
    inside = (np.round(v) >= low) & (np.round(v) <= high)
    slope_x, slope_s = jax.grad(lambda x, s: learned_step(x, s, point, format).sum(), (0, 1))(x, s)
    np.testing.assert_array_equal(slope_x, inside.astype(np.float32))
    np.testing.assert_allclose(slope_s, np.where(inside, level - v, level).sum(), rtol=1e-5)


def test_drops_the_rounding_of_a_share_of_the_elements() -> None:
    x = jax.random.normal(jax.random.key(0), (100, 100))
    spec = QuantSpec(format=IntFormat(4), block=Granularity.TENSOR)
    given = Scales(jnp.float32(0.2))
    rule = LearnedActivation(0.25)
    rounded = rule(x, given, spec, [1], None)
    dropped = rule(x, given, spec, [1], jax.random.key(1))
    assert ((dropped == x) | (dropped == rounded)).all()
    share = float((dropped == x).mean())
    assert abs(share - 0.25) < 5 * np.sqrt(0.25 * 0.75 / x.size)  # five standard deviations


def test_weights_of_outputs_are_mean_squared_gradients() -> None:
    params, x = variables(2), samples(3, 8)
    pieces = Pieces(network, params, [x], lambda leaf: leaf.path.split("/")[0])

    def leaves(x: Leaf) -> jax.Array:
        block, _, name = x.path.partition("/")
        return params[block][name] if name else params[block]

    loss = lambda y, key: jnp.sum(jnp.sin(y))  # noqa: E731
    found = output_weights(pieces, leaves, loss)
    h = x
    for i in range(2):  # the outputs of each block, and what follows as a function of them
        own = params[f"block{i}"]
        h = jax.nn.relu(h + jax.nn.relu(h @ own["in"]) @ own["out"])
        rest = {k: v for k, v in params.items() if k == "head" or k > f"block{i}"}

        def after(h: jax.Array, rest: Any = rest) -> jax.Array:
            for name in sorted(set(rest) - {"head"}):
                h = jax.nn.relu(h + jax.nn.relu(h @ rest[name]["in"]) @ rest[name]["out"])
            return loss(h @ rest["head"], None)

        expected = jnp.mean(jax.grad(after)(h) ** 2, axis=0, keepdims=True)
        np.testing.assert_allclose(found[i][0], expected, rtol=1e-4)
    logits = network(params, x)
    np.testing.assert_allclose(found[2][0], np.mean(np.cos(logits) ** 2, 0)[None], rtol=1e-4)


def test_own_labels_have_the_curvature_of_the_loss() -> None:
    """The variance of p - y for y drawn from p is p (1 - p)."""
    logits = jnp.array([[1.0, 0.0, -1.0]])
    keys = jax.random.split(jax.random.key(0), 4000)
    slopes = jax.vmap(lambda key: jax.grad(own_labels)(logits, key))(keys)
    p = jax.nn.softmax(logits)
    np.testing.assert_allclose(jnp.mean(slopes**2, 0), p * (1 - p), atol=0.02)  # 1 / sqrt(4000)


@pytest.mark.full
@pytest.mark.parametrize("case", daily(["one sample", "constant"], ["constant"]))
def test_poor_data_gives_finite_weights(case: str) -> None:
    params = {name: variables(3)[name] for name in ("block0", "head")}
    x = samples(0, 1) if case == "one sample" else jnp.ones((8, 12))
    method = ptq.qdrop("w4a8", blocks=BLOCKS, steps=5)
    q = qj.calibrate(network, params, [x], method)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(qj.dequantize(q)))
    assert np.isfinite(error(params, q, x))


def test_nan_in_an_activation_is_named() -> None:
    x = samples(0).at[40].set(jnp.nan)
    with pytest.raises(ValueError, match="block0/in: batch 1: what its block gives holds NaN"):
        qj.calibrate(network, variables(0), [x], ptq.brecq("w4", blocks=BLOCKS, steps=2, loss=None))


def test_an_unknown_block_is_named() -> None:
    with pytest.raises(ValueError, match=r"'blok\*' matches no parameter. Nearest: 'block"):
        qj.calibrate(network, variables(0), [samples(0)], ptq.brecq("w4", blocks=("blok*",)))


@pytest.mark.full
def test_layers_of_a_scan_are_blocks_of_their_own() -> None:
    rng = np.random.default_rng(0)
    params = {"layers": jnp.asarray(rng.normal(size=(3, 8, 8)) / 3, jnp.float32)}

    def apply(p: Any, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"])[0]

    x, noted = samples(0, 32, 8), []
    method = ptq.brecq("w3", blocks=("layers",), steps=100, loss=None)
    q = qj.calibrate(apply, params, [x], method, on_batch=lambda i, state: noted.append(i))
    assert noted == [0, 1, 2] and q["layers"].shape == (3, 8, 8)
    nearest = qj.quantize(params, "w3", sites=qj.sites(apply, params, x))
    target = apply(params, x)
    ours, plain = (
        float(jnp.mean((apply(qj.dequantize(t), x) - target) ** 2)) for t in (q, nearest)
    )
    assert ours < plain
