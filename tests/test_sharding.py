"""Does quantizing an array that is spread over devices give what it gives whole, where it lies?"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import quantjax as qj
from quantjax.formats import Codebook, IntFormat, binary, e4m3, ternary
from quantjax.spec import Granularity, QuantSpec
from tests.daily import daily, dealt

SHAPE = (64, 32)
NAME = "mlp/kernel"
# Two meshes of the eight devices: 'n', or 'x' by 'y'.
MESHES = {"line": ((8,), ("n",)), "grid": ((4, 2), ("x", "y"))}

# Policy, mesh, how the array is cut. Ranges are absmax, as searches take long to compile.
INT4, INT3 = IntFormat(4), IntFormat(3)
CASES = {
    "w8 column": (QuantSpec(format=IntFormat(8)), "line", P(None, "n")),
    "w4 row": (QuantSpec(format=INT4, group=8), "line", P("n", None)),
    "w3 row": (QuantSpec(format=INT3, group=8), "line", P("n")),
    "ternary column": (QuantSpec(format=ternary), "grid", P(None, ("x", "y"))),
    "binary column": (QuantSpec(format=binary), "line", P(None, "n")),
    "fp8 column": ("fp8", "line", P(None, "n")),
    "nf4 row": ("nf4g16", "grid", P("x", None)),
    "mxfp4 both": ("mxfp4", "grid", P("y", "x")),
    "asymmetric": (
        QuantSpec(format=INT4, symmetric=False, observer=qj.minmax(), group=16),
        "grid",
        P("x", None),
    ),
}


# Daily bytes of 3 bits, two axes of the mesh on one, a table, quantized scales, zero points.
CORE = ("w3 row", "ternary column", "nf4 row", "mxfp4 both", "asymmetric")

KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def of_kinds(names: str, *tables):
    """Daily each case on one kind of mesh."""
    return pytest.mark.parametrize(f"{names}, kind", dealt(*tables, KINDS), indirect=["kind"])


def make_mesh(name: str, kind: AxisType) -> jax.sharding.Mesh:
    shape, names = MESHES[name]
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


def sample(shape: tuple[int, ...] = SHAPE) -> jax.Array:
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    x[..., 3] = 0
    return jnp.asarray(x)


def put(x: jax.Array, kind: AxisType, mesh: str, spec: P) -> dict:
    return {"mlp": {"kernel": jax.device_put(x, NamedSharding(make_mesh(mesh, kind), spec))}}


def whole(x: jax.Array) -> dict:
    return {"mlp": {"kernel": x}}


def policy_of(spec) -> qj.Policy:
    return qj.Policy([(NAME, spec)])


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (u.dtype, u.shape) == (v.dtype, v.shape)
        assert np.asarray(u).tobytes() == np.asarray(v).tobytes()


def assert_lies_as(leaf: jax.Array, source: jax.Array):
    """Every device holds of `leaf` the same fraction of each axis as of `source`."""
    held = leaf.sharding.shard_shape(leaf.shape)
    expected = source.sharding.shard_shape(source.shape)
    for n, part, total, local in zip(leaf.shape, held, source.shape, expected, strict=True):
        assert part * (total // local) == n


@of_kinds("case", daily(CASES, CORE))
def test_shards_give_the_numbers_of_the_whole_where_they_lie(case, kind):
    spec, mesh, cut = CASES[case]
    policy, x = policy_of(spec), sample()
    p = put(x, kind, mesh, cut)
    source = p["mlp"]["kernel"]
    q, expected = qj.quantize(p, policy), qj.quantize(whole(x), policy)
    assert_same_bits(q, expected)
    values, fake = qj.dequantize(q), qj.fake_quantize(p, policy)
    assert_same_bits(values, qj.dequantize(expected))
    assert_same_bits(fake, values)
    for leaf in jax.tree.leaves((values, fake)):
        assert leaf.sharding.is_equivalent_to(source.sharding, 2)
    for leaf in jax.tree.leaves(q):  # codes, scales and zero points
        assert_lies_as(leaf, source)


def test_every_shard_is_a_quantized_array_of_its_own(kind):
    block, _, cut = CASES["w4 row"]
    p = put(sample(), kind, "line", cut)
    q = qj.quantize(p, policy_of(block))["mlp"]["kernel"]
    parts = zip(p["mlp"]["kernel"].addressable_shards, q.qvalue.addressable_shards, strict=True)
    for x, codes in parts:
        alone = qj.quantize(whole(jnp.asarray(np.asarray(x.data))), policy_of(block))
        assert_same_bits(jnp.asarray(np.asarray(codes.data)), alone["mlp"]["kernel"].qvalue)
        assert x.device == codes.device


@of_kinds("case", ["w8 column", "w4 row"])
def test_inside_jit(case, kind):
    spec, mesh, cut = CASES[case]
    policy, x = policy_of(spec), sample()
    p, expected = put(x, kind, mesh, cut), qj.quantize(whole(x), policy)
    q = jax.jit(lambda p: qj.quantize(p, policy))(p)
    assert_same_bits(q, expected)
    back = jax.jit(lambda q: qj.dequantize(q))(q)
    assert_same_bits(back, qj.dequantize(expected))
    assert_same_bits(jax.jit(lambda p: qj.fake_quantize(p, policy))(p), back)


@of_kinds("jitted", [False, True])
def test_the_gradient_is_that_of_the_whole(jitted, kind):
    spec, mesh, cut = CASES["w4 row"]
    x = sample()
    scale = qj.quantize(whole(x / 2), policy_of(spec))  # so that some values are clipped

    def gradient(p, like):
        return jax.grad(lambda p: jnp.sum(qj.fake_quantize(p, like=like)["mlp"]["kernel"] ** 2))(p)

    expected = gradient(whole(x), scale)
    like = qj.quantize(put(x / 2, kind, mesh, cut), policy_of(spec))
    p = put(x, kind, mesh, cut)
    with jax.set_mesh(make_mesh(mesh, kind)):  # JAX differentiates on Explicit meshes only so
        got = (jax.jit(gradient) if jitted else gradient)(p, like)
    assert_same_bits(got, expected)
    assert (np.asarray(got["mlp"]["kernel"]) == 0).any()
    assert got["mlp"]["kernel"].sharding.is_equivalent_to(p["mlp"]["kernel"].sharding, 2)


def test_noise_and_weights_follow_the_array(kind, key):
    spec = QuantSpec(
        format=INT4, group=8, rounding=qj.Rounding.STOCHASTIC, observer=qj.mse(steps=2)
    )
    x, policy = sample(), policy_of(spec)
    weights = whole(jnp.arange(1.0, 65.0)[:, None])
    q = qj.quantize(put(x, kind, "line", P("n")), policy, key=key, weights=weights)
    assert_same_bits(q, qj.quantize(whole(x), policy, key=key, weights=weights))


def test_scales_of_a_whole_array_are_cut_for_it(kind):
    x = sample()
    like = qj.quantize(whole(x), policy_of(CASES["w4 row"][0]))
    q = qj.quantize(put(x, kind, "line", P("n")), like=like)
    assert_same_bits(q, like)


def test_layers_may_be_cut_even_with_scales_above():
    x, policy = sample((8, 4, 8)), policy_of(QuantSpec(format=Codebook.learned(1), stacked=1))
    q = qj.quantize(put(x, AxisType.Explicit, "line", P("n")), policy)
    assert_same_bits(q, qj.quantize(whole(x), policy))


REFUSED = {
    "block over shards": (
        "w8",
        P("n", None),
        r"a block of 64 on axis 0 does not fit in shards of 8",
    ),
    "group over shards": ("w8g16", P("n", None), r"a block of 16 on axis 0 .* divides 8"),
    "group across the cut": ("w8g5", P("n", None), r"a block of 5 on axis 0"),
    "tensor": (
        QuantSpec(format=e4m3, block=Granularity.TENSOR),
        P(None, "n"),
        r"a block of 32 on axis 1",
    ),
    "nvfp4": ("nvfp4", P(None, "n"), r"a scale in .* is shared by several shards"),
    "codebook": (QuantSpec(format=Codebook.learned(3)), P(None, "n"), r"a learned codebook is"),
}


@of_kinds("case", REFUSED)
def test_what_no_shard_can_do_alone_is_refused(case, kind):
    spec, cut, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"{NAME}: {message}"):
        qj.quantize(put(sample(), kind, "line", cut), policy_of(spec))


@pytest.mark.parametrize(
    "preset, shape, cut",
    [
        ("w4g12", (64, 32), P("n")),  # blocks straddle the shards
        ("w3", (8, 8), P("n")),  # bits straddle bytes
        ("w4", (32, 16), P("n")),
        ("mxfp4", (64, 32), P("n")),
        ("w8", (64, 32), P("n", None)),
    ],
)
def test_codes_cut_after_they_were_made_are_read_right(preset, shape, cut):
    q = qj.quantize(whole(sample(shape)), preset)
    mesh = make_mesh("line", AxisType.Auto)

    def put_if_it_fits(a):
        fits = a.ndim == 2 and a.shape[0] % 8 == 0
        return jax.device_put(a, NamedSharding(mesh, cut if fits else P()))

    for tree in (
        jax.tree.map(put_if_it_fits, q),
        {
            "mlp": {
                "kernel": dataclasses.replace(
                    q["mlp"]["kernel"], qvalue=put_if_it_fits(q["mlp"]["kernel"].qvalue)
                )
            }
        },
    ):
        assert_same_bits(qj.dequantize(tree), qj.dequantize(q))


@of_kinds("cut", [P("n"), P(None, "n")])
def test_what_stands_beside_the_codes_is_cut_with_them(cut, kind):
    """A scale of the inputs and low-rank factors, whole on every device where they do not vary."""
    q = qj.quantize(whole(sample()), policy_of(QuantSpec(format=INT4, group=8)))["mlp"]["kernel"]
    q = dataclasses.replace(
        q,
        input_scale=1 + sample((64, 4))[:, :1] ** 2,
        left=sample((64, 1, 4)),
        right=sample((1, 32, 4)),
    )

    def put(a):
        entries = [e if n > 1 else None for e, n in zip((*cut, None), a.shape, strict=False)]
        return jax.device_put(a, NamedSharding(make_mesh("line", kind), P(*entries)))

    scaled = dataclasses.replace(q, left=None, right=None)
    assert_same_bits(qj.dequantize(jax.tree.map(put, scaled)), qj.dequantize(scaled))
    got = qj.dequantize(jax.tree.map(put, q))
    assert tuple(got.sharding.spec)[: len(cut)] == tuple(cut)
    # The sum over the rank is one of floats, in the order that suits the shape of a shard.
    np.testing.assert_allclose(got, qj.dequantize(q), rtol=1e-5, atol=1e-5)


def test_a_scale_block_over_several_shards_is_refused(kind):
    above = QuantSpec(format=IntFormat(8), block=(3, 1))
    spec = QuantSpec(format=INT4, group=8, scale_format=above)
    with pytest.raises(ValueError, match=f"{NAME}: a scale in int8 is shared by several shards"):
        qj.quantize(put(sample((128, 32)), kind, "line", P("n")), policy_of(spec))


@of_kinds("shape", [(), (32,), (64, 1)])
def test_weights_of_lower_rank_are_cut_as_they_broadcast(kind, shape):
    policy = policy_of(QuantSpec(format=INT4, group=8, observer=qj.mse(steps=4)))
    weights = whole(jnp.asarray(np.random.default_rng(1).uniform(0.1, 1, shape), jnp.float32))
    x = sample()
    q = qj.quantize(put(x, kind, "line", P("n")), policy, weights=weights)
    assert_same_bits(q, qj.quantize(whole(x), policy, weights=weights))


def test_bytes_are_not_split(kind):
    p = put(sample((8,)), kind, "line", P("n"))  # one code of 4 bits for each device
    spec = QuantSpec(format=INT4, block=(1,))
    with pytest.raises(ValueError, match=f"{NAME}: 1 codes of 4 bits on axis 0 .* whole bytes"):
        qj.quantize(p, policy_of(spec))


def test_nan_in_one_shard_names_the_leaf(kind):
    with pytest.raises(ValueError, match=f"{NAME}: holds NaN"):
        qj.quantize(put(sample().at[5, 20].set(jnp.nan), kind, "line", P(None, "n")), "w8")


def test_an_array_on_all_devices_is_whole(kind):
    q = qj.quantize(put(sample(), kind, "line", P()), "nvfp4")
    assert_same_bits(q, qj.quantize(whole(sample()), "nvfp4"))
