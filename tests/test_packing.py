"""Is packing exact, dense, and laid out as documented?"""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import quantjax as qj
from quantjax import affine
from quantjax.packing import pack, packed_axis, packed_length, unpack
from quantjax.spec import QuantSpec
from tests.daily import daily


def random_codes(bits: int, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**bits, shape, dtype=np.uint8)


def little_endian_stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """The documented layout by arithmetic on one big integer: code i takes bits i*b and up."""
    number = sum(int(code) << (i * bits) for i, code in enumerate(codes))
    return np.frombuffer(number.to_bytes(-(-len(codes) * bits // 8), "little"), np.uint8)


@settings(max_examples=16)  # of a few lengths, as each is a program; `test_every_length` has all
@given(bits=st.integers(1, 8), n=st.sampled_from([0, 3, 70]), seed=st.integers(0, 2**16))
def test_unpack_inverts_pack_and_the_stream_is_little_endian(bits, n, seed):
    codes = random_codes(bits, (n,), seed)
    packed = pack(jnp.asarray(codes), bits)
    assert packed.dtype == jnp.uint8
    assert packed.shape == (packed_length(n, bits),) == (-(-n * bits // 8),)
    np.testing.assert_array_equal(packed, little_endian_stream(codes, bits))
    np.testing.assert_array_equal(unpack(packed, bits, n), codes)


@pytest.mark.parametrize("bits", daily([1, 3, 4, 8], [3, 8]))
def test_any_axis_jit_and_vmap(bits):
    codes = jnp.asarray(random_codes(bits, (5, 11, 3)))
    for axis in (-3, -1, 1):
        n = codes.shape[axis]
        packed = pack(codes, bits, axis)
        expected = np.apply_along_axis(little_endian_stream, axis, np.asarray(codes), bits)
        np.testing.assert_array_equal(packed, expected)
        np.testing.assert_array_equal(unpack(packed, bits, n, axis), codes)
    axis, n = -2, 11
    jitted = jax.jit(pack, static_argnums=(1, 2))(codes, bits, axis)
    np.testing.assert_array_equal(jitted, pack(codes, bits, axis))
    back = jax.jit(unpack, static_argnums=(1, 2, 3))(jitted, bits, n, axis)
    np.testing.assert_array_equal(back, codes)
    mapped = jax.vmap(lambda c: pack(c, bits, axis))(codes)
    np.testing.assert_array_equal(mapped, jitted)
    back = jax.vmap(lambda p: unpack(p, bits, n, axis))(mapped)
    np.testing.assert_array_equal(back, codes)


@pytest.mark.full
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_length(bits):
    for n in range(71):
        codes = random_codes(bits, (n, 2), n)
        packed = pack(jnp.asarray(codes), bits, 0)
        assert packed.shape[0] == -(-n * bits // 8)
        np.testing.assert_array_equal(unpack(packed, bits, n, 0), codes)


@pytest.mark.parametrize("bits, n, length", [(4, 3, 3), (3, 8, 4), (1, 9, 1), (8, 4, 3)])
def test_wrong_length_raises(bits, n, length):
    with pytest.raises(ValueError, match=f"holds {length} bytes, but {n} codes"):
        unpack(jnp.zeros(length, jnp.uint8), bits, n)


def test_the_packed_axis_wastes_least():
    assert packed_axis((3, 3, 5, 64), 0, 4, (True, True, True, False)) == -1
    assert packed_axis((64, 10), 0, 4, (True, False)) == -2
    assert packed_axis((10, 64), 0, 4, (False, True)) == -1  # a row keeps its own bytes
    assert packed_axis((8, 3, 3), 1, 4, (True, True, True)) != -3  # layers are never packed


@pytest.mark.parametrize("bits", daily([1, 3, 4], [4]))
def test_a_slice_of_a_stacked_tensor_is_that_layer(bits):
    """Static data stays true when a leading axis is removed, and under scan."""
    x = jnp.asarray(np.random.default_rng(bits).normal(size=(3, 10, 7)), jnp.float32)
    levels = qj.IntFormat(1, levels=qj.formats.Levels.HALF) if bits == 1 else qj.IntFormat(bits)
    spec = QuantSpec(format=levels, block=(None, 1), stacked=1)
    scales = affine.find_scales(x, spec)
    q = affine.quantize_array(x, scales, spec=spec)
    assert q.shape == x.shape and q.ndim == 3 and q.size == x.size
    y = affine.dequantize_array(q)
    layer = jax.tree.map(lambda a: a[1], q)
    assert layer.shape == (10, 7)
    np.testing.assert_array_equal(affine.dequantize_array(layer), y[1])
    _, scanned = jax.lax.scan(lambda c, qi: (c, affine.dequantize_array(qi)), 0, q)
    np.testing.assert_array_equal(scanned, y)
    np.testing.assert_array_equal(jax.vmap(affine.dequantize_array)(q), y)


def test_bytes_count_everything():
    x = jnp.ones((64, 10))
    spec = QuantSpec(format=qj.IntFormat(4), block=(None, 1))
    q = affine.quantize_array(x, affine.find_scales(x, spec), spec=spec)
    assert q.nbytes == 64 * 10 // 2 + 10 * 4  # codes and one float32 per column
    assert q.bits_per_weight == 8 * q.nbytes / 640
