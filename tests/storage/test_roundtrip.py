"""Does every format, granularity, dtype and setting come back from disk bit for bit?"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
from quantjax.rounding import Rounding
from quantjax.spec import Granularity, QuantSpec
from quantjax.storage import load, save
from quantjax.storage.leaves import DTYPES
from quantjax.storage.statics import _CLASSES
from tests.daily import daily

from .trees import BESIDE, assert_same, normal, quantized, quantized_shape, random_bits

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


# Daily each kind of format, and of bits those that share bytes in another way.
CORE = [FORMATS[i] for i in (1, 2, 6, 7, 10, 12, 15, 16, 17, 18, 21, 23, -3, -2, -1)]


@pytest.mark.parametrize("case", daily(FORMATS, CORE), ids=lambda case: f"{case[0]}-{case[1]}"[:60])
def test_round_trip_of_every_format_granularity_and_dtype(tmp_path, case):
    format, options = case
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


def test_what_stands_beside_the_codes_comes_back(tmp_path):
    """Whole and in part; a file without it names nothing of it, as before."""
    q = BESIDE
    tree = {
        "all": q,
        "scaled": dataclasses.replace(q, left=None, right=None),
        "corrected": dataclasses.replace(q, input_scale=None),
        "layer": jax.tree.map(lambda a: a[1], q),
    }
    save(tmp_path / "q", tree)
    assert_same(load(tmp_path / "q"), tree)
    assert_same(load(tmp_path / "q", like=tree), tree)
    for name, stored in load(tmp_path / "q").items():
        assert_same(dequantize_array(stored), dequantize_array(tree[name]))
    with pytest.raises(storage.StructureMismatch, match="the same children"):
        load(tmp_path / "q", like=tree | {"all": q.bare})
    save(tmp_path / "bare", q.bare)
    assert b"input_scale" not in (tmp_path / "bare").read_bytes()


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


def test_sharded_arrays_are_gathered(tmp_path):
    mesh = jax.make_mesh((len(jax.devices()),), ("d",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    x = normal(16, 3)
    save(tmp_path / "q", {"x": jax.device_put(x, sharding), "q": quantized(x)})
    assert_same(load(tmp_path / "q"), {"x": x, "q": quantized(x)})
