"""Do static activation scales come out as by hand, per layer, and never wrong in silence?"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import quantjax as qj
from quantjax.formats import e4m3
from quantjax.spec import Granularity
from tests.daily import daily

from .models import CASES, normal

INT8 = qj.IntFormat(8)


def spec(**act) -> qj.QuantSpec:
    return qj.QuantSpec(format=INT8, act=qj.QuantSpec(**{"format": INT8, **act}))


def mlp(p, x):
    return jnp.tanh(x @ p["a"]["kernel"]) @ p["b"]["kernel"]


PARAMS = {"a": {"kernel": normal(6, 8)}, "b": {"kernel": normal(8, 3, seed=2)}}
BATCHES = [normal(n, 6, seed=n) for n in (4, 7, 4)]  # of two sizes
STACK = {"kernel": normal(3, 6, 6) / 2}


def scanned(p, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["kernel"])[0]


def scales(tree) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, qj.QTensor))
    return {
        jax.tree_util.keystr(path): np.asarray(x.act_scale)
        for path, x in leaves
        if isinstance(x, qj.QTensor) and x.act_scale is not None
    }


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_equals_a_static_quantization_by_hand():
    q = qj.calibrate(mlp, PARAMS, BATCHES, "w8a8", observer=qj.percentile(95.0))
    hidden = [np.tanh(np.asarray(x @ PARAMS["a"]["kernel"])) for x in BATCHES]
    for name, seen in (("a", BATCHES), ("b", hidden)):
        p = np.mean([np.quantile(np.abs(np.asarray(x, np.float64)), 0.95) for x in seen])
        # float32 against float64: a few roundings of the quantile, the mean and the product.
        np.testing.assert_allclose(q[name]["kernel"].act_scale, p / 127, rtol=1e-5)
        assert q[name]["kernel"].act_scale.shape == ()

    def by_hand(x, w):
        s = np.float64(w.act_scale)
        codes = np.clip(np.round(np.asarray(x, np.float64) / s), -127, 127)
        return codes * s @ np.asarray(qj.dequantize(w), np.float64)

    x = BATCHES[1]
    got = jax.jit(qj.intercept(mlp))(q, x)
    expected = by_hand(np.tanh(by_hand(x, q["a"]["kernel"])), q["b"]["kernel"])
    # Exact products of integers and their scales, in float32; tanh differs in the last bits, and a
    # value in a hundred thousand may then round to the next code.
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_the_default_is_a_percentile_and_a_static_spec_keeps_its_own():
    for given, expected in (
        (spec(), qj.percentile(99.99)),
        (spec(static=True, block=Granularity.TENSOR), qj.absmax()),
        (spec(static=True, block=Granularity.TENSOR, observer=qj.ema(0.5)), qj.ema(0.5)),
    ):
        q = qj.calibrate(mlp, PARAMS, BATCHES, qj.Policy(otherwise=given))
        act = q["a"]["kernel"].act
        assert (act.static, act.block, act.observer) == (True, Granularity.TENSOR, expected)


def test_absmax_clips_nothing_and_does_not_mind_the_order():
    first = qj.calibrate(mlp, PARAMS, BATCHES, "w8a8", observer=qj.absmax())
    same(first, qj.calibrate(mlp, PARAMS, iter(BATCHES[::-1]), "w8a8", observer=qj.absmax()))
    largest = max(float(jnp.abs(x).max()) for x in BATCHES)
    np.testing.assert_array_equal(
        first["a"]["kernel"].act_scale, np.float32(largest) * np.float32(1 / 127)
    )


ACTS = {
    "int8": dict(),
    "int4": dict(format=qj.IntFormat(4)),
    "asymmetric": dict(format=qj.IntFormat(8, signed=False), symmetric=False),
    "unsigned": dict(format=qj.IntFormat(8, signed=False)),
    "e4m3": dict(format=e4m3),
}
OBSERVERS = [qj.absmax(), qj.minmax(), qj.ema(0.9), qj.percentile(99.9), qj.mse(steps=20)]


PAIRS = [*((name, qj.absmax()) for name in ACTS), *(("asymmetric", o) for o in OBSERVERS[1:])]


@pytest.mark.parametrize("pair", daily(PAIRS, PAIRS[1::2]), ids=repr)
def test_every_format_and_observer_stays_close(pair):
    name, observer = pair
    apply = lambda p, x: jnp.maximum(x, 0) @ p["kernel"]  # noqa: E731
    params = {"kernel": normal(64, 8)}
    batches = [normal(40, 64, seed=i) for i in range(3)]
    q = qj.calibrate(apply, params, batches, qj.Policy(otherwise=spec(**ACTS[name])),
                     observer=observer)  # fmt: skip
    w = q["kernel"]
    assert w.act_scale.dtype == jnp.float32
    assert (w.act_zero_point is None) == (name != "asymmetric")
    got, expected = jax.jit(qj.intercept(apply))(q, batches[0]), apply(params, batches[0])
    # Half a step of 4 bits is a 14th of the range, some 3 standard deviations wide.
    most = 0.25 if name == "int4" else 0.05
    assert jnp.linalg.norm(got - expected) <= most * jnp.linalg.norm(expected)


@pytest.mark.parametrize(
    "observer", daily([qj.ema(0.9), qj.percentile(99.9)], [qj.percentile(99.9)]), ids=repr
)
def test_layers_of_a_scan_have_scales_of_their_own(observer):
    layers = {str(i): {"kernel": w} for i, w in enumerate(STACK["kernel"])}

    def unrolled(p, x):
        for i in range(3):
            x = jnp.tanh(x @ p[str(i)]["kernel"])
        return x

    q = qj.calibrate(scanned, STACK, BATCHES, "w8a8", observer=observer)
    assert q["kernel"].act_scale.shape == (3,)
    apart = qj.calibrate(unrolled, layers, BATCHES, "w8a8", observer=observer)
    expected = [apart[str(i)]["kernel"].act_scale for i in range(3)]
    np.testing.assert_allclose(q["kernel"].act_scale, expected, rtol=1e-5)
    np.testing.assert_allclose(
        jax.jit(qj.intercept(scanned))(q, BATCHES[0]), unrolled(layers, BATCHES[0]), atol=0.1
    )


def test_a_block_that_spans_layers_has_one_scale_for_all():
    policy = qj.preset("w8a8").resolve(STACK)  # by names, which know of no layers
    q = qj.calibrate(scanned, STACK, BATCHES, policy, observer=qj.absmax())
    apart = qj.calibrate(scanned, STACK, BATCHES, "w8a8", observer=qj.absmax())
    np.testing.assert_array_equal(q["kernel"].act_scale, apart["kernel"].act_scale.max())
    got = jax.jit(qj.intercept(scanned))(q, BATCHES[0])
    np.testing.assert_allclose(got, scanned(STACK, BATCHES[0]), atol=0.1)


INDEXED = {
    "one by one": lambda p, x: functools.reduce(lambda x, w: jnp.tanh(x @ w), p["kernel"], x),
    "counted": lambda p, x: lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["kernel"][i]), x),
    "taken": lambda p, x: lax.fori_loop(
        0, 3, lambda i, x: jnp.tanh(x @ jnp.take(p["kernel"], i, axis=0)), x
    ),
}


@pytest.mark.parametrize("name", daily(INDEXED, ["one by one", "taken"]))
def test_layers_taken_by_their_index_have_scales_of_their_own(name):
    q = qj.calibrate(INDEXED[name], STACK, BATCHES[:1], "w8a8", observer=qj.absmax())
    expected = qj.calibrate(scanned, STACK, BATCHES[:1], "w8a8", observer=qj.absmax())
    np.testing.assert_allclose(q["kernel"].act_scale, expected["kernel"].act_scale, rtol=1e-6)
    got = jax.jit(qj.intercept(INDEXED[name]))(q, BATCHES[0])
    np.testing.assert_allclose(got, qj.intercept(scanned)(expected, BATCHES[0]), rtol=1e-5)


def test_layers_of_layers_backwards_and_recomputed():
    kernel = normal(2, 3, 6, 6) / 2

    def nested(p, x):
        inner = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
        outer = jax.checkpoint(lambda x, w: lax.scan(inner, x, w, reverse=True))
        return lax.scan(outer, x, p["kernel"])[0]

    q = qj.calibrate(nested, {"kernel": kernel}, BATCHES, "w8a8", observer=qj.absmax())
    expected = np.zeros((2, 3))
    for x in BATCHES:
        for i in range(2):
            for j in (2, 1, 0):
                expected[i, j] = max(expected[i, j], float(jnp.abs(x).max()) / 127)
                x = jnp.tanh(x @ kernel[i, j])
    np.testing.assert_allclose(q["kernel"].act_scale, expected, rtol=1e-5)


def loop(kind):
    """Three steps with one parameter, in each way JAX has to repeat them."""

    def step(p, x):
        return 2 * (x @ p["kernel"])

    if kind == "scan":
        return lambda p, x: lax.scan(lambda x, _: (step(p, x), None), x, length=3)[0]
    if kind == "while":
        return lambda p, x: lax.while_loop(
            lambda s: s[1] < 3, lambda s: (step(p, s[0]), s[1] + 1), (x, 0)
        )[0]
    if kind == "condition":  # stops by a product of its own, which sees the last x too

        def run(p, x):
            return lax.while_loop(
                lambda s: (s[0] @ p["kernel"]).sum() * 0 + s[1] < 2,
                lambda s: (step(p, s[0]), s[1] + 1),
                (x, 0),
            )[0]

        return run
    return lambda p, x: step(p, jax.jit(step)(p, jax.checkpoint(step)(p, x)))


@pytest.mark.parametrize(
    "kind", daily(["scan", "while", "condition", "calls"], ["scan", "condition", "calls"])
)
def test_uses_in_turn_share_one_scale(kind):
    params = {"kernel": jnp.eye(6)}
    q = qj.calibrate(loop(kind), params, BATCHES, "w8a8", observer=qj.absmax())
    largest = max(float(jnp.abs(x).max()) for x in BATCHES)
    np.testing.assert_allclose(q["kernel"].act_scale, 4 * largest / 127, rtol=1e-6)


def test_only_the_branch_that_is_taken_counts():
    def apply(p, x):
        take = lambda name: lambda x: x @ p[name]["kernel"]  # noqa: E731
        return lax.cond(x.sum() > 0, take("a"), take("b"), x)

    params = {name: {"kernel": normal(6, 6)} for name in "ab"}
    small, large = jnp.full((2, 6), 0.5), jnp.full((3, 6), -8.0)
    q = qj.calibrate(apply, params, [small, large], "w8a8", observer=qj.absmax())
    np.testing.assert_allclose(q["a"]["kernel"].act_scale, 0.5 / 127, rtol=1e-6)
    np.testing.assert_allclose(q["b"]["kernel"].act_scale, 8 / 127, rtol=1e-6)
    with pytest.raises(ValueError, match="^b/kernel: no batch came to its product"):
        qj.calibrate(apply, params, [small], "w8a8")


def test_a_layer_that_never_runs_is_named():
    def apply(p, x):
        skip = lambda x, w, i: lax.cond(i == 1, lambda: x, lambda: x @ w)  # noqa: E731
        return lax.scan(lambda x, wi: (skip(x, *wi), None), x, (p["kernel"], jnp.arange(3)))[0]

    with pytest.raises(ValueError, match=r"^kernel \(layer 1\): no batch came to its product"):
        qj.calibrate(apply, STACK, BATCHES, "w8a8")


MODELS = (
    *("linen decoder", "nnx CNN", "plain experts"),
    *("plain control flow", "plain stacked layers"),
)


@pytest.mark.parametrize("name", daily(MODELS, ["nnx CNN"]))
def test_models_of_every_framework_get_a_scale_at_every_product(name):
    case = CASES[name]()
    q = qj.calibrate(case.apply, case.params, [case.x], "w8a8", observer=qj.absmax())
    found = scales(q)
    assert len(found) == case.used
    assert all(np.isfinite(s).all() and (s > 0).all() for s in found.values())
    if name == "linen decoder":  # any batch and length
        other = jnp.arange(6).reshape(3, 2)
        assert jax.eval_shape(qj.intercept(case.apply), q, other).shape == (3, 2, 24)
        assert {s.shape for path, s in found.items() if "layers" in path} == {(2,)}
    got, expected = jax.jit(qj.intercept(case.apply))(q, case.x), case.apply(case.params, case.x)
    # Some 1 % for each of up to ten products, in turn or beside each other.
    assert jnp.linalg.norm(got - expected) <= 0.05 * jnp.linalg.norm(expected)


def test_the_image_is_observed_without_what_pads_it():
    apply = lambda p, x: lax.conv(x, p["kernel"], (1, 1), "SAME")  # noqa: E731
    x = normal(2, 3, 4, 4)
    q = qj.calibrate(
        apply, {"kernel": normal(4, 3, 3, 3)}, [x], "w8a8", observer=qj.percentile(60.0)
    )
    p = np.quantile(np.abs(np.asarray(x, np.float64)), 0.6)
    np.testing.assert_allclose(q["kernel"].act_scale, p / 127, rtol=1e-5)


def test_a_tree_quantized_before_keeps_its_codes():
    q = qj.quantize(PARAMS, "w8a8")
    static = qj.calibrate(mlp, q, BATCHES, observer=qj.absmax())
    same(q["a"]["kernel"].qvalue, static["a"]["kernel"].qvalue)
    largest = max(float(jnp.abs(x).max()) for x in BATCHES)
    np.testing.assert_allclose(static["a"]["kernel"].act_scale, largest / 127, rtol=1e-6)
    again = qj.calibrate(mlp, static, [10 * BATCHES[0]], observer=qj.absmax())
    largest = 10 * float(jnp.abs(BATCHES[0]).max())
    np.testing.assert_allclose(again["a"]["kernel"].act_scale, largest / 127, rtol=1e-6)


@pytest.mark.parametrize("observer", daily(OBSERVERS[2:], [OBSERVERS[-1]]), ids=repr)
def test_going_on_from_a_saved_state_changes_no_bit(observer, tmp_path):
    def save(i, state):
        qj.save(tmp_path / f"{i}.safetensors", state)

    policy = qj.preset("w8a8").resolve(STACK, qj.sites(scanned, STACK, BATCHES[0]))
    whole = qj.calibrate(scanned, STACK, BATCHES, "w8a8", observer=observer, on_batch=save)
    half = qj.load(tmp_path / "0.safetensors")
    same(whole, qj.calibrate(scanned, STACK, BATCHES[1:], policy, observer=observer, state=half))
    full = qj.load(tmp_path / "2.safetensors")
    same(whole, qj.calibrate(scanned, STACK, [], policy, observer=observer, state=full))
    assert sorted(full) == ["kernel"] and full["kernel"]["count"].tolist() == [3, 3, 3]


def test_batches_are_spread_and_static_parts_stay():
    def apply(p, x, scale, flag):
        return (x @ p["kernel"]) * (scale["by"] if flag else 1)

    params = {"kernel": normal(6, 2)}
    batch = (BATCHES[0], {"by": 2.0}, True)
    q = qj.calibrate(apply, params, [batch], "w8a8", observer=qj.absmax())
    np.testing.assert_allclose(
        q["kernel"].act_scale, float(jnp.abs(BATCHES[0]).max()) / 127, rtol=1e-6
    )
    words = lambda p, b: b["x"] @ p["kernel"]  # noqa: E731
    same(q, qj.calibrate(words, params, [{"x": BATCHES[0]}], "w8a8", observer=qj.absmax()))


def test_compiles_once_for_each_shape():
    traces = 0

    def counted(p, x):
        nonlocal traces
        traces += 1
        return mlp(p, x)

    qj.calibrate(counted, PARAMS, [*BATCHES, *BATCHES], "w8a8")
    assert traces == 1 + 2  # for the sites, and for two sizes
    qj.calibrate(counted, PARAMS, BATCHES[::-1], "w8a8")
    assert traces == 3 + 1  # other batches: for the sites alone


def test_a_model_that_can_not_be_hashed_is_calibrated_too():
    @dataclasses.dataclass
    class Model:
        def __call__(self, p, x):
            return mlp(p, x)

    found, expected = (qj.calibrate(f, PARAMS, BATCHES[:1], "w8a8") for f in (Model(), mlp))
    same(found, expected)


@pytest.mark.parametrize("kind", daily([AxisType.Auto, AxisType.Explicit], [AxisType.Explicit]))
def test_sharded_inputs_and_parameters(kind):
    mesh = jax.make_mesh((2, 2), ("data", "model"), (kind, kind), devices=jax.devices()[:4])
    put = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))  # noqa: E731
    apply = lambda p, x: jnp.tanh(x @ p["kernel"])  # noqa: E731
    params, batches = {"kernel": put(normal(6, 8), None, "model")}, BATCHES[::2]
    for observer in (qj.absmax(), qj.percentile(99.9)):
        with jax.set_mesh(mesh):
            got = qj.calibrate(
                apply, params, [put(x, "data") for x in batches], "w8a8", observer=observer
            )
        alone = qj.calibrate(apply, {"kernel": normal(6, 8)}, batches, "w8a8", observer=observer)
        np.testing.assert_allclose(got["kernel"].act_scale, alone["kernel"].act_scale, rtol=1e-5)


def test_a_table_that_is_only_looked_up_has_no_activation():
    def apply(p, i):
        return p["embed"]["embedding"][i] @ p["head"]["kernel"] + p["shift"]["table"]

    params = {
        "embed": {"embedding": normal(9, 6)},
        "head": {"kernel": normal(6, 3)},
        "shift": {"table": normal(2, 3)},
    }
    policy = qj.Policy([("embed/embedding", "w8a8")], otherwise="w8a8")
    q = qj.calibrate(apply, params, [jnp.array([1, 2])], policy)
    assert set(scales(q)) == {"['head']['kernel']"}
    assert q["embed"]["embedding"].act is None and q["shift"]["table"].act is None
    assert qj.intercept(apply)(q, jnp.array([3, 8])).shape == (2, 3)


def test_bfloat16_models_and_numpy_batches():
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), PARAMS)
    batches = [np.asarray(x.astype(jnp.bfloat16)) for x in BATCHES]
    q = qj.calibrate(mlp, params, batches, "w8a8", observer=qj.absmax())
    largest = max(float(np.abs(x).max()) for x in batches)
    assert q["a"]["kernel"].act_scale == np.float32(largest) * np.float32(1 / 127)
    assert jax.jit(qj.intercept(mlp))(q, batches[0]).dtype == jnp.bfloat16


def test_zeros_get_a_finite_scale():
    q = qj.calibrate(mlp, PARAMS, [jnp.zeros((2, 6))], "w8a8")
    assert q["a"]["kernel"].act_scale == 1
    assert jnp.isfinite(qj.intercept(mlp)(q, BATCHES[0])).all()


def test_a_percentile_beats_absmax_where_one_activation_is_far_off():
    apply = lambda p, xs: [x @ p[f"{i}"]["kernel"] for i, x in enumerate(xs)]  # noqa: E731
    params = {f"{i}": {"kernel": normal(64, 16, seed=i)} for i in range(5)}
    batch = [normal(256, 64, seed=i + 10) for i in range(5)]
    outlier = [x.at[3, 5].set(100.0) for x in batch]
    errors = {}
    for observer in (qj.percentile(99.99), qj.absmax()):
        q = qj.calibrate(apply, params, [outlier], "w8a8", observer=observer)
        pairs = zip(jax.jit(qj.intercept(apply))(q, batch), apply(params, batch), strict=True)
        errors[observer] = np.array([jnp.linalg.norm(y - e) for y, e in pairs])
    # On all five seeds, and by far: absmax spends 20 times the range on one value.
    assert (errors[qj.percentile(99.99)] < errors[qj.absmax()] / 4).all()


BAD = {
    "no batches": (dict(batches=[]), ValueError, "at least one batch, got none"),
    "one array": (dict(batches=BATCHES[0]), TypeError, r"a single batch is \[batch\]"),
    "a dict": (dict(batches={"x": BATCHES[0]}), TypeError, "an iterable of batches"),
    "weight-only": (dict(policy="w8"), ValueError, "no parameter asks for quantized activations"),
    "a float tree": (dict(policy=None), ValueError, "no parameter asks for quantized activations"),
    "not a policy": (dict(policy=8), TypeError, "must be a Policy, a preset name"),
    "quantized twice": (
        dict(params=qj.quantize(PARAMS, "w8")), ValueError, "a/kernel: is quantized already",
    ),
    "NaN": (
        dict(batches=[BATCHES[0], BATCHES[1].at[0, 0].set(jnp.nan)]),
        ValueError, "a/kernel, b/kernel: batch 1: the activation holds NaN or infinity",
    ),
    "infinity": (
        dict(batches=[BATCHES[0].at[0, 0].set(jnp.inf)], observer=qj.absmax()),
        ValueError, "a/kernel: batch 0: the activation holds NaN or infinity",
    ),
    "a state of others": (
        dict(state={"kernel": {"count": jnp.ones(1)}}), ValueError, "state= is of other parameters",
    ),
    "a policy without a batch": (
        dict(batches=[], state={}), ValueError, "without a batch there is no model to see",
    ),
    "in no product": (
        dict(apply=lambda p, x: x @ p["a"]["kernel"] + p["b"]["kernel"].sum(),
             policy=qj.Policy([("**/kernel", "w8a8")])),
        ValueError, "^b/kernel: the policy quantizes the activation, but the model has no product",
    ),
    "layers used at once": (
        dict(apply=lambda p, x: jnp.einsum("td,ldf->ltf", x, p["kernel"]),
             params=qj.quantize(STACK, qj.Policy([("kernel", dataclasses.replace(
                 spec(), stacked=1))])), policy=None),
        ValueError, r"kernel: its leading axes \(3,\) are layers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    given, kind, text = BAD[name]
    words = {"apply": mlp, "params": PARAMS, "batches": BATCHES, "policy": "w8a8", **given}
    with pytest.raises(kind, match=text):
        qj.calibrate(**words)
