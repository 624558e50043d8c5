"""Does a tree come back from disk bit for bit, in whatever structure it was?"""

import dataclasses
import os
import threading
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open

from quantjax import storage
from quantjax.affine import dequantize_array, find_scales, quantize_array
from quantjax.formats import (
    Codebook,
    ExponentFormat,
    FloatFormat,
    IntFormat,
    Levels,
    ScaleRule,
    apot,
    e2m1,
    e2m3,
    e3m2,
    e4m3,
    e5m2,
    nf4,
)
from quantjax.observers import absmax, ema, minmax, mse, percentile
from quantjax.qtensor import QTensor, is_qtensor
from quantjax.rounding import Rounding
from quantjax.spec import Granularity, QuantSpec
from quantjax.storage import load, read_header, save
from quantjax.storage.leaves import DTYPES
from quantjax.storage.statics import _CLASSES

GOLDEN = Path(__file__).parent / "golden" / "storage.safetensors"


INT4 = IntFormat(4)


def random_bits(shapes: Any) -> Any:
    """Any bits at all, NaN among them: what storage does must not depend on the values."""
    random = np.random.default_rng(0)

    def fill(a: Any) -> Any:
        if not isinstance(a, jax.ShapeDtypeStruct):
            return a
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            return jax.random.key(1)
        size = int(np.prod(a.shape)) * a.dtype.itemsize
        return jnp.asarray(np.frombuffer(random.bytes(size), a.dtype).reshape(a.shape))

    return jax.tree.map(fill, shapes)


def quantized_shape(x: Any, format: Any = INT4, block: Any = (None, 1), **options: Any) -> Any:
    """The QTensor that quantizing x would give, with shapes for arrays; nothing is compiled."""
    spec = QuantSpec(format=format, block=block, **options)
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.eval_shape(lambda x: quantize_array(x, find_scales(x, spec), spec=spec), shape)


def quantized(*args: Any, **kwargs: Any) -> QTensor:
    return random_bits(quantized_shape(*args, **kwargs))


def normal(*shape: int, dtype: Any = jnp.float32, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def assert_same(a: Any, b: Any) -> None:
    """Equal structure, static data, holders, dtypes, shapes and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert isinstance(x, jax.Array) == isinstance(y, jax.Array)
        if not isinstance(x, jax.Array):
            assert type(x) is type(y)
        if hasattr(x, "dtype"):
            assert x.dtype == y.dtype and x.shape == y.shape
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
                x, y = jax.random.key_data(x), jax.random.key_data(y)
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
        else:
            assert x == y or x != x and y != y


def names(tree: Any) -> Any:
    """The tree as `load` gives it without `like`: fields to dicts, tuples to lists."""
    if is_qtensor(tree):
        return tree
    if isinstance(tree, dict):
        return {key: names(value) for key, value in tree.items()}
    return [names(value) for value in tree] if isinstance(tree, list | tuple) else tree


FORMATS = (
    [(IntFormat(bits), {}) for bits in range(2, 9)]
    + [(IntFormat(bits, levels=Levels.HALF), {}) for bits in (1, 2, 8)]
    + [(IntFormat(3, levels=Levels.FULL), {}), (IntFormat(4, signed=False), {})]
    + [(IntFormat(bits, signed=False), dict(symmetric=False)) for bits in (3, 8)]
    + [(IntFormat(8), dict(symmetric=False)), (nf4, {}), (apot(5), {}), (Codebook.learned(2), {})]
    + [(format, {}) for format in (e4m3, e5m2, e3m2, e2m3, e2m1, FloatFormat(2, 0))]
    + [(e2m1, dict(scale_format=ExponentFormat(rule))) for rule in ScaleRule]
    + [(e2m1, dict(scale_format=e4m3))]
    + [(IntFormat(4), dict(scale_format=QuantSpec(format=IntFormat(8), block=(None, None))))]
)
BLOCKS = [(None, None), (None, 1), (1, None), (4, 1), (3, 4)]


@pytest.mark.parametrize("format, options", FORMATS, ids=lambda v: str(v)[:40])
def test_round_trip_of_every_format_granularity_and_dtype(tmp_path, format, options):
    x, stack = normal(10, 6), normal(2, 10, 6)
    tree: dict[str, Any] = {"stack": quantized_shape(stack, format, **options)}
    for block in BLOCKS:
        shapes = quantized_shape(x, format, block, **options)
        for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
            tree[f"{block} {dtype}"] = dataclasses.replace(shapes, dtype=np.dtype(dtype))
    tree = random_bits(tree)
    tree["layer"] = jax.tree.map(lambda a: a[0], tree["stack"])
    save(tmp_path / "q", tree)
    assert_same(load(tmp_path / "q"), tree)
    assert_same(load(tmp_path / "q", like=tree), tree)


def test_the_values_are_those_that_were_quantized(tmp_path):
    spec = QuantSpec(format=IntFormat(3), block=(4, 1))
    q = jax.jit(lambda x: quantize_array(x, find_scales(x, spec), spec=spec))(normal(10, 6))
    save(tmp_path / "q", q)
    assert_same(load(tmp_path / "q"), q)
    assert_same(dequantize_array(load(tmp_path / "q")), dequantize_array(q))


ACTS = [
    QuantSpec(format=IntFormat(8), block=Granularity.ROW, observer=percentile(99.99)),
    QuantSpec(format=e4m3, block=Granularity.TENSOR, observer=mse(2.4, steps=7, lowest=0.3)),
    QuantSpec(format=IntFormat(4, signed=False), symmetric=False, observer=ema(0.9), group=8),
    QuantSpec(format=nf4, observer=minmax(), rounding=Rounding.STOCHASTIC, stacked=1),
    QuantSpec(format=e2m1, block=(1, 32), scale_format=ExponentFormat(ScaleRule.EVEN)),
    QuantSpec(format=e2m1, scale_format=QuantSpec(format=e4m3, block=(None, None))),
    QuantSpec(format=Codebook.learned(3), act=QuantSpec(format=IntFormat(2), observer=absmax())),
]


def test_activation_specs_come_back_equal(tmp_path):
    tree = [quantized(normal(4, 4), act=act) for act in ACTS]
    save(tmp_path / "q", tree)
    assert [q.act for q in load(tmp_path / "q")] == ACTS


def test_every_field_of_every_listed_class_is_written():
    for name, entry in _CLASSES.items():
        assert set(entry.cls.__dataclass_fields__) == set(entry.fields), name


def test_observers_of_the_user_are_refused(tmp_path):
    class Mine(type(absmax())):
        pass

    q = quantized(normal(4, 4), act=QuantSpec(format=IntFormat(8), observer=Mine()))
    with pytest.raises(storage.CannotStore, match=r"head/w.*Mine.*one of .*percentile"):
        save(tmp_path / "q", {"head": {"w": q}})


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 5)])
def test_arrays_of_every_dtype(tmp_path, dtype, shape):
    host = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    with jax.enable_x64(True):
        tree = {"jax": jnp.asarray(host), "numpy": host, "scalar": np.ones((), dtype)[()]}
        save(tmp_path / "q", tree)
        assert_same(load(tmp_path / "q"), tree)
        assert_same(load(tmp_path / "q", like=tree), tree)


def test_byte_order_and_memory_layout_do_not_matter(tmp_path):
    x = np.arange(6, dtype=">i4").reshape(2, 3)
    save(tmp_path / "q", {"big": x, "turned": x.T, "bits": np.array([np.nan, -0.0])})
    back = load(tmp_path / "q")
    np.testing.assert_array_equal(back["big"], x)
    np.testing.assert_array_equal(back["turned"], x.T)
    assert np.signbit(back["bits"][1])


def test_wide_arrays_are_not_narrowed_in_silence(tmp_path):
    with jax.enable_x64(True):
        save(tmp_path / "q", {"w": jnp.arange(3, dtype=jnp.int64)})
    with pytest.raises(storage.StorageError, match="'w': stored as int64.*enable_x64"):
        load(tmp_path / "q")


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_random_keys(tmp_path, impl):
    tree = {"one": jax.random.key(3, impl=impl), "two": jax.random.split(jax.random.key(1), 2)}
    save(tmp_path / "q", tree)
    assert_same(load(tmp_path / "q"), tree)
    assert_same(load(tmp_path / "q", like=jax.eval_shape(lambda: tree)), tree)
    with pytest.raises(storage.StructureMismatch, match="one: expected uint32"):
        load(tmp_path / "q", like=tree | {"one": jnp.zeros((), jnp.uint32)})


class Pair(NamedTuple):
    a: Any
    b: Any


def test_plain_structures_come_back_and_like_restores_the_rest(tmp_path):
    shared = normal(3)
    tree = {
        "list": [normal(2), (normal(1), {"deep": quantized(normal(4, 4))})],
        "tuple": Pair(shared, shared),
        "ints": {3: normal(1), 10: normal(2)},
        "odd/name": {"": normal(1), "__metadata__": normal(1), "é\n\ud800": normal(1)},
        "odd": {"name": {"": normal(2)}},
        "plain": [1, -(2**70), True, 1 / 3, float("inf"), float("nan"), "text \ud800", None],
        "empty": [{}, [], (), {"inner": []}],
        "__metadata__": normal(2),
    }
    save(tmp_path / "q", tree)
    expected = names(tree) | {"tuple": {"a": shared, "b": shared}}
    assert_same(load(tmp_path / "q"), expected)
    assert_same(load(tmp_path / "q", like=tree), tree)


@pytest.mark.parametrize("tree", [normal(3), quantized(normal(4, 4)), 3, None, {}, [normal(1)]])
def test_the_root_may_be_a_leaf(tmp_path, tree):
    save(tmp_path / "q", tree)
    assert_same(load(tmp_path / "q"), tree)


def quantize_matrices(tree: Any) -> Any:
    def convert(x: Any) -> Any:
        return quantized(x) if isinstance(x, jax.Array) and x.ndim == 2 else x

    return jax.tree.map(convert, tree)


def test_linen_variables(tmp_path):
    shapes = jax.eval_shape(nn.Dense(4).init, jax.random.key(0), jnp.ones((1, 3)))
    variables = random_bits(shapes)
    tree = quantize_matrices(variables)
    save(tmp_path / "q", tree)
    assert_same(load(tmp_path / "q"), tree)
    assert_same(load(tmp_path / "q", like=shapes), tree)


def test_nnx_state(tmp_path):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(2, 3, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)])
            self.drop = nnx.Dropout(0.5, rngs=rngs)

    state = random_bits(nnx.state(nnx.eval_shape(lambda: Net(nnx.Rngs(0)))))
    tree = quantize_matrices(state)
    save(tmp_path / "q", tree)
    back = load(tmp_path / "q", like=state)
    assert_same(back, tree)
    assert isinstance(back, nnx.State)
    kernel = load(tmp_path / "q")["layers"][0]["kernel"]["value"]
    assert is_qtensor(kernel)


def test_equinox_module_with_functions(tmp_path):
    build = partial(eqx.nn.MLP, 2, 2, 4, 1, use_bias=False, key=jax.random.key(0))
    model = random_bits(eqx.filter_eval_shape(build))
    tree = quantize_matrices(model)
    save(tmp_path / "q", tree)
    back = load(tmp_path / "q", like=model)
    assert_same(eqx.filter(back, eqx.is_array), eqx.filter(tree, eqx.is_array))
    assert back.activation is model.activation
    # Functions are code: without `like` they are not made up, and another one is not accepted.
    with pytest.raises(
        storage.StructureMismatch, match=r"activation is the function 'relu'.*like="
    ):
        load(tmp_path / "q")
    other = eqx.tree_at(lambda m: m.activation, model, jax.nn.gelu)
    with pytest.raises(storage.StructureMismatch, match=r"activation: expected.*got .* relu"):
        load(tmp_path / "q", like=other)
    # The other idiom: functions filtered out before saving.
    save(tmp_path / "f", eqx.filter(tree, eqx.is_array))
    assert load(tmp_path / "f", like=model).activation is model.activation


def test_like_names_all_that_differs(tmp_path):
    save(tmp_path / "q", {"dense": {"kernel": quantized(normal(4, 6)), "bias": normal(6)}, "x": 1})
    like = {"dense": {"kernal": normal(4, 6), "bias": normal(5)}, "x": "1"}
    with pytest.raises(storage.StructureMismatch) as caught:
        load(tmp_path / "q", like=like)
    message = str(caught.value)
    assert "dense/kernal: missing from the file; the file has 'dense/kernel'" in message
    assert "dense/bias: expected float32[5], got float32[6]" in message
    assert "x: expected '1', got 1" in message
    assert "dense/kernel: in the file, not in `like`" in message


@pytest.mark.parametrize(
    "like, message",
    [
        (normal(6, 4), r"expected float32\[6, 4\], got QTensor\(int4, shape=\(4, 6\)"),
        (normal(4, 6, dtype=jnp.bfloat16), r"expected bfloat16"),
        (quantized(normal(4, 6), IntFormat(8)), "expected format int8, got int4"),
        (quantized(normal(4, 6), block=(2, 1)), r"expected block \(2, 1\)"),
        (quantized(normal(4, 6), act=ACTS[0]), "expected act QuantSpec"),
        (None, "expected None, got QTensor"),
        (len, "got QTensor"),
        (3.0, r"expected 3\.0, got QTensor"),
        ([], r"expected \[\], got QTensor"),
    ],
)
def test_like_that_does_not_fit_a_qtensor(tmp_path, like, message):
    save(tmp_path / "q", [quantized(normal(4, 6))])
    with pytest.raises(storage.StructureMismatch, match=f"0: .*{message}"):
        load(tmp_path / "q", like=[like])


def test_like_with_a_qtensor_where_the_file_is_float(tmp_path):
    save(tmp_path / "q", [normal(4, 6)])
    with pytest.raises(storage.StructureMismatch, match=r"QTensor.*got the float array float32\[4"):
        load(tmp_path / "q", like=[quantized(normal(4, 6))])


@jax.tree_util.register_pytree_node_class
class Silent:
    """A node with neither keys nor, sometimes, leaves."""

    def __init__(self, *children):
        self.children = children

    def tree_flatten(self):
        return self.children, None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_custom_nodes(tmp_path):
    tree = {"a": Silent(normal(1), normal(2))}
    save(tmp_path / "q", tree)
    assert_same(load(tmp_path / "q"), {"a": [normal(1), normal(2)]})
    assert_same(load(tmp_path / "q", like=tree), tree)
    gap = [normal(1), Silent(), normal(2)]
    save(tmp_path / "q", gap)
    with pytest.raises(storage.StructureMismatch, match=r"only positions \[0, 2\].*like="):
        load(tmp_path / "q")
    assert_same(load(tmp_path / "q", like=gap), gap)


@pytest.mark.parametrize(
    "leaf, message",
    [
        (object(), r"\(object\): expected an array"),
        ({1, 2}, r"\(set\): expected an array"),
        (np.array(["a"]), "dtype <U1: expected one of bool"),
        (np.array([None]), "dtype object"),
        (jax.ShapeDtypeStruct((2,), jnp.float32), "a shape without values"),
        ({(1, 2): normal(1)}, r"a/\(1, 2\): key"),
        (QTensor(normal(2, 2), normal(2, 2), format=IntFormat(8), block=(1, 1)), "qvalue: .*int8"),
        (QTensor(jnp.zeros((2, 2), jnp.int8), normal(3, 1), format=IntFormat(8), block=(1, 1)),
         r"scale: expected one per block, \(2, 2\), got shape \(3, 1\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_stored_is_named(tmp_path, leaf, message):
    with pytest.raises(storage.CannotStore, match=f"a.*{message}"):
        save(tmp_path / "q", {"a": leaf})
    assert not os.listdir(tmp_path)


def test_traced_and_deleted_arrays_are_refused(tmp_path):
    with pytest.raises(storage.CannotStore, match="a/b: a traced value.*outside jit"):
        jax.jit(lambda x: save(tmp_path / "q", {"a": {"b": x}}))(normal(2))
    gone = normal(2)
    gone.delete()
    with pytest.raises(storage.CannotStore, match="a: a deleted array"):
        save(tmp_path / "q", {"a": gone})


def test_sharded_arrays_are_gathered(tmp_path):
    mesh = jax.make_mesh((len(jax.devices()),), ("d",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    x = normal(16, 3)
    save(tmp_path / "q", {"x": jax.device_put(x, sharding), "q": quantized(x)})
    assert_same(load(tmp_path / "q"), {"x": x, "q": quantized(x)})


def test_same_tree_same_bytes_and_metadata(tmp_path):
    q, x = quantized(normal(4, 4)), normal(3)
    save(tmp_path / "a", {"q": q, "x": x}, metadata={"step": "7", "by": "é"})
    save(tmp_path / "b", {"x": x, "q": q}, metadata={"by": "é", "step": "7"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    header = read_header(tmp_path / "a")
    assert header.metadata == {"step": "7", "by": "é"} and header.version == 1
    assert header.leaves[0] == ("q", "qtensor", (4, 4), "float32", "int4", q.nbytes)
    assert header.leaves[1] == ("x", "array", (3,), "float32", None, 12)
    for bad in ({"quantjax.x": "1"}, {"a": 1}, {"a": "\ud800"}):
        with pytest.raises((storage.CannotStore, TypeError)):
            save(tmp_path / "a", x, metadata=bad)


def golden_tree() -> Any:
    codes, ones = np.arange(6, dtype=np.uint8).reshape(2, 3), np.ones((1, 3), np.float32)
    act = QuantSpec(format=IntFormat(8), block=Granularity.ROW, observer=percentile(99.5))
    exponents = QTensor(jnp.asarray(codes + 126), None, format=ExponentFormat(), block=(1, 1))
    int3 = QTensor(
        jnp.asarray(codes),
        jnp.asarray(ones),
        format=IntFormat(3),
        block=(4, 1),
        packed=(-2, 4),
        dtype=np.dtype(jnp.bfloat16),
        act=act,
    )
    mx = QTensor(jnp.asarray(codes), exponents, format=e2m1, block=(2, 1), packed=(-2, 4))
    table = QTensor(jnp.asarray(codes), jnp.asarray(ones), format=apot(3), block=(None, 1))
    return {"w": int3, "mx": [mx, table], "plain": (jnp.arange(3), ones, None, 0.1, "text")}


def test_files_of_version_1_stay_readable(tmp_path):
    """If the second line fails the layout changed: raise FORMAT_VERSION, read both, add a file.

    The file was made by `save(GOLDEN, golden_tree(), metadata={"made by": "test_storage"})`."""
    assert_same(load(GOLDEN, like=golden_tree()), golden_tree())
    save(tmp_path / "q", golden_tree(), metadata={"made by": "test_storage"})
    assert (tmp_path / "q").read_bytes() == GOLDEN.read_bytes()


def test_other_tools_read_the_file(tmp_path):
    tree = {"w": quantized(normal(8, 6)), "b": normal(6, dtype=jnp.bfloat16), "c": np.ones(2, "c8")}
    save(tmp_path / "q", tree, metadata={"step": "7"})
    with safe_open(tmp_path / "q", "np") as file:
        assert set(file.keys()) == {"w.qvalue", "w.scale", "b", "c"}
        assert file.metadata()["step"] == "7"
        np.testing.assert_array_equal(file.get_tensor("w.qvalue"), tree["w"].qvalue)
        np.testing.assert_array_equal(file.get_tensor("b"), tree["b"])


@pytest.mark.parametrize(
    "format, options",
    [
        (IntFormat(8), {}),
        (IntFormat(4), dict(block=(64, 1))),
        (e2m1, dict(block=(16, 1), scale_format=e4m3)),
        (apot(8), dict(act=QuantSpec(format=apot(8)))),  # the longest tables
    ],
)
def test_file_is_at_most_one_percent_over_codes_and_scales(tmp_path, format, options):
    # Barely above 1 MiB, where the header weighs most.
    q = quantized(normal(2**20 * 8 // format.bits // 1024 + 16, 1024), format, **options)
    assert q.nbytes > 2**20
    save(tmp_path / "q", {"kernel": q})
    size = os.path.getsize(tmp_path / "q")
    assert q.nbytes < size <= 1.01 * q.nbytes
    with safe_open(tmp_path / "q", "np") as file:
        on_disk = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert on_disk == q.nbytes


def test_saves_at_the_same_time_leave_one_whole_file(tmp_path):
    trees = [{"w": jnp.full((50, 50), i)} for i in range(4)]
    threads = [threading.Thread(target=save, args=(tmp_path / "q", tree)) for tree in trees]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert os.listdir(tmp_path) == ["q"]
    value = int(load(tmp_path / "q")["w"][0, 0])
    assert_same(load(tmp_path / "q"), trees[value])
