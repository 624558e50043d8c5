"""The trees that the storage tests save, and what it means that one came back."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quantjax.affine import find_scales, quantize_array
from quantjax.formats import Codebook, FloatFormat, IntFormat
from quantjax.observers import percentile
from quantjax.qtensor import QTensor
from quantjax.spec import Granularity, QuantSpec

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


def codes(*shape: int, dtype: Any = jnp.uint8) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, 100, shape), dtype)


ACT = QuantSpec(format=IntFormat(8), block=Granularity.ROW, observer=percentile(99.9))

NESTED = QTensor(codes(3, 4), jnp.ones((1, 1)), format=FloatFormat(4, 3), block=(None, None))

BESIDE = QTensor(  # an input scale and factors of rank 2, for each of three layers
    codes(3, 4, 5, dtype=jnp.int8),
    jnp.ones((3, 1, 5)),
    input_scale=jnp.arange(12.0).reshape(3, 4, 1),
    left=jnp.arange(24, dtype=jnp.bfloat16).reshape(3, 4, 1, 2),
    right=jnp.arange(30.0).reshape(3, 1, 5, 2),
    format=IntFormat(8),
    block=(None, 1),
)

TREE = {
    "a": QTensor(codes(3, 4), NESTED, format=IntFormat(4), block=(2, 1), packed=(-2, 6), act=ACT),
    "b": [jnp.arange(5, dtype=jnp.bfloat16), None, "text", 1.5],
    "c": QTensor(
        codes(4, 3),
        jnp.ones((1, 3)),
        codebook=jnp.arange(4.0),
        format=Codebook.learned(2),
        block=(None, 1),
    ),
}
