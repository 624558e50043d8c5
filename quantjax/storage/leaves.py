"""What does the header say of one leaf? Kind, format, block, logical shape, dtype, its buffers.

A leaf without its bytes is a skeleton: the same QTensor with a `Buffer` for every array."""

import dataclasses
import hashlib
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from quantjax.blocks import sizes
from quantjax.fake_quantized import is_quantized
from quantjax.formats import is_learned
from quantjax.packing import packed_length
from quantjax.qtensor import QTensor
from quantjax.storage import statics
from quantjax.storage.container import is_size

# One byte or more per element: what `nbytes` counts is what is on disk.
_NAMES = """
    bool int2 int4 int8 int16 int32 int64 uint2 uint4 uint8 uint16 uint32 uint64 float16 bfloat16
    float32 float64 complex64 complex128 float4_e2m1fn float8_e3m4 float8_e4m3 float8_e4m3fn
    float8_e4m3b11fnuz float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu"""
DTYPES = {n: np.dtype(getattr(jnp, n)) for n in _NAMES.split() if hasattr(jnp, n)}
_KEY_WORDS = {"threefry2x32": 2, "rbg": 4, "unsafe_rbg": 4}
_KEY_DTYPES = {"threefry2x32": "key<fry>", "rbg": "key<rbg>", "unsafe_rbg": "key<urbg>"}
PLAIN = ("jax", "numpy", "scalar")
_SCALARS = (bool, int, float, str)
NO_DIGEST = "0" * 32


@dataclasses.dataclass(eq=False)
class Buffer:
    """An array without its bytes: where they are, what they mean, and what came of hashing them.

    holder: "jax", "numpy", "scalar" (a NumPy scalar), or the name of a random generator. start:
    its first byte in the file.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    holder: str
    digest: str = NO_DIGEST
    source: Any = None
    start: int = 0

    @property
    def nbytes(self) -> int:
        """The bytes on disk."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def ndim(self) -> int:
        """The rank."""
        return len(self.shape)

    @property
    def facts(self) -> tuple[tuple[int, ...], str]:
        """Shape and dtype as JAX shows them: a random key is one element."""
        if self.holder in _KEY_WORDS:
            return self.shape[:-1], _KEY_DTYPES[self.holder]
        return self.shape, self.dtype.name


class Value(NamedTuple):
    """A plain number, text, or None."""

    value: Any


class Function(NamedTuple):
    """Code, which no file holds; `like` has to bring it."""

    name: str


class Empty(NamedTuple):
    """A container with nothing in it: "dict" or "list"."""

    container: str


def digest_of(data: np.ndarray) -> str:
    """The digest of a buffer's bytes."""
    return hashlib.blake2b(data.data, digest_size=16).hexdigest()


def bytes_of(buffer: Buffer) -> np.ndarray:
    """The bytes of a buffer's array, fetched from its device, little-endian."""
    array = buffer.source
    if buffer.holder in _KEY_WORDS:
        array = jax.random.key_data(array)
    return raw_bytes(np.asarray(array, buffer.dtype))


def raw_bytes(array: Any) -> np.ndarray:
    """The bytes of an array, of this machine's order."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def array_of(buffer: Buffer, data: np.ndarray) -> Any:
    """The array again, in memory of its own. Raises ValueError if JAX would change its dtype."""
    array = data.view(buffer.dtype).reshape(buffer.shape)
    if buffer.holder == "numpy":
        return array.copy()
    if buffer.holder == "scalar":
        return array[()]
    result = jnp.array(array, copy=True)
    if result.dtype != buffer.dtype:
        raise ValueError(
            f"stored as {buffer.dtype}, which JAX now turns into {result.dtype}; load it under "
            "jax.enable_x64(True)"
        )
    if buffer.holder in _KEY_WORDS:
        return jax.random.wrap_key_data(result, impl=buffer.holder)
    return result


def is_leaf(x: Any) -> bool:
    """QTensors are leaves, and so are FakeQuantized, to be refused, and None and empty containers,
    which would vanish otherwise."""
    return x is None or is_quantized(x) or isinstance(x, dict | list | tuple) and not x


def skeleton(leaf: Any, name: str) -> Any:
    """The leaf without its bytes. Raises ValueError for what cannot be stored.

    A skeleton, or a QTensor of buffers, gives its own, under the name here.
    """
    if isinstance(leaf, QTensor):
        children = {c: getattr(leaf, c) for c in (*_CHILDREN, *_LATER)}
        for child, value in children.items():
            if value is not None:
                part = f"{name}.{child}" if name else child
                children[child] = skeleton(value, part)
        result = dataclasses.replace(leaf, **children)
        check_qtensor(result)
        return result
    if isinstance(leaf, jax.Array | np.ndarray | np.generic):
        return _buffer(leaf, name or "array")
    if isinstance(leaf, Buffer):
        return Buffer(name or "array", leaf.dtype, leaf.shape, leaf.holder)
    if isinstance(leaf, Value | Function | Empty):
        return leaf
    if leaf is None or type(leaf) in _SCALARS:
        return Value(leaf)
    if isinstance(leaf, dict | list | tuple):
        return Empty("dict" if isinstance(leaf, dict) else "list")
    if callable(leaf):
        return Function(function_name(leaf))
    what = "a shape without values" if isinstance(leaf, jax.ShapeDtypeStruct) else repr(leaf)
    raise ValueError(
        f"{what:.80} ({type(leaf).__name__}): expected an array, a QTensor, a number, text or "
        "None; convert it, or take it out of the tree"
    )


_CHILDREN = ("qvalue", "scale", "zero_point", "codebook")
_ACT_CHILDREN = ("act_scale", "act_zero_point", "act_thresholds")
_BESIDE = ("input_scale", "left", "right")
_LATER = (*_ACT_CHILDREN, *_BESIDE)  # named in a file only where they are there


def function_name(function: Any) -> str:
    """What a function is called; its address, which changes, is left out."""
    return str(getattr(function, "__name__", type(function).__name__))


def _buffer(array: Any, name: str) -> Buffer:
    if isinstance(array, jax.core.Tracer):
        raise ValueError("a traced value; call save outside jit, grad and vmap")
    if isinstance(array, np.ndarray | np.generic):
        dtype = np.dtype(array.dtype).newbyteorder("=")
        holder = "numpy" if isinstance(array, np.ndarray) else "scalar"
    else:
        if array.is_deleted():
            raise ValueError("a deleted array: its buffer was donated; save before donating it")
        if not array.is_fully_addressable:
            raise ValueError(
                "spread over other processes too; gather it first, with "
                "jax.experimental.multihost_utils.process_allgather"
            )
        dtype, holder, shape = array.dtype, "jax", array.shape
        if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
            holder = str(jax.random.key_impl(array))
            if holder not in _KEY_WORDS:
                raise ValueError(
                    f"keys of the generator {holder}; expected one of {', '.join(_KEY_WORDS)}; "
                    "store jax.random.key_data of it"
                )
            dtype, shape = np.dtype(np.uint32), (*array.shape, _KEY_WORDS[holder])
            return Buffer(name, dtype, shape, holder, source=array)
    _read_shape(list(array.shape))
    if DTYPES.get(dtype.name) != dtype:
        raise ValueError(f"dtype {dtype}: expected one of {', '.join(DTYPES)}")
    return Buffer(name, DTYPES[dtype.name], tuple(array.shape), holder, source=array)


def check_qtensor(q: QTensor) -> None:
    """Raises ValueError unless children and static data of a QTensor fit together.

    Asked when saving and again when loading, so what is written can be read.
    """
    for name in (*_CHILDREN[1:], *_LATER):
        child = getattr(q, name)
        fits = isinstance(child, Buffer) and child.holder in PLAIN
        if child is not None and not fits and not (name == "scale" and isinstance(child, QTensor)):
            raise ValueError(f"{name}: expected an array, got {child!r:.80}")
    codes: Any = q.qvalue
    if not isinstance(codes, Buffer) or codes.dtype not in (np.int8, np.uint8):
        raise ValueError(f"qvalue: expected codes of int8 or uint8, got {codes!r:.80}")
    if len(q.block) > codes.ndim:
        raise ValueError(f"block {q.block} has more axes than the codes, {codes.shape}")
    if q.packed is not None:
        axis, length = q.packed
        if not -codes.ndim <= axis < 0 or length < 0 or codes.dtype != np.uint8:
            raise ValueError(f"packed {q.packed} does not fit codes {codes.dtype}{codes.shape}")
        if codes.shape[axis] != packed_length(length, q.format.bits):
            raise ValueError(
                f"packed {q.packed}: {length} codes of {q.format.bits} bits take "
                f"{packed_length(length, q.format.bits)} bytes, axis {axis} of {codes.shape} has "
                f"{codes.shape[axis]}"
            )
    blocks = [-(-n // max(b, 1)) for n, b in zip(q.shape, sizes(q.shape, q.block), strict=True)]
    for name, child in (("scale", q.scale), ("zero_point", q.zero_point)):
        if child is None:
            continue
        fits = child.ndim == q.ndim
        if not fits or any(n not in (1, b) for n, b in zip(child.shape, blocks, strict=True)):
            raise ValueError(
                f"{name}: expected one per block, {tuple(blocks)}, got shape {child.shape}"
            )
    learned = is_learned(q.format)
    if learned != (q.codebook is not None):
        raise ValueError(f"codebook: {q.format} {'needs one' if learned else 'takes none'}")
    if q.codebook is not None and (
        q.codebook.ndim != q.ndim - len(q.block) + 1 or q.codebook.shape[-1] != 2**q.format.bits
    ):
        raise ValueError(f"codebook: expected (..., {2**q.format.bits}), got {q.codebook.shape}")
    for name in _ACT_CHILDREN:
        child, lead = getattr(q, name), q.shape[: q.ndim - len(q.block)]
        if name == "act_thresholds" and q.act is not None:
            lead = (*lead, 2**q.act.format.bits - 1)
        if child is not None and (q.act is None or child.shape != lead):
            raise ValueError(
                f"{name}: expected an act, and entries per leading axis, {lead}; got act {q.act} "
                f"and shape {child.shape}"
            )
    _check_beside(q)


def _check_beside(q: QTensor) -> None:
    """Raises ValueError unless what stands beside the codes has the axes of the array."""
    if (q.left is None) != (q.right is None):
        raise ValueError("left, right: expected both low-rank factors, or none")
    shape, lead = q.shape, q.ndim - len(q.block)
    for name in _BESIDE:
        child = getattr(q, name)
        if child is None:
            continue
        own = child.shape if name == "input_scale" else child.shape[:-1]
        fits = child.ndim == q.ndim + (name != "input_scale") and own[:lead] == shape[:lead]
        if not fits or any(n not in (1, full) for n, full in zip(own, shape, strict=True)):
            rank = "" if name == "input_scale" else " and a rank"
            raise ValueError(
                f"{name}: expected axes of {shape}{rank}, of length one where it is constant and "
                f"whole along the first {lead}, got shape {child.shape}"
            )
        if not jnp.issubdtype(child.dtype, jnp.floating):
            raise ValueError(f"{name}: expected floats, got {child.dtype}")
    if q.left is not None and q.right is not None and q.left.shape[-1] != q.right.shape[-1]:
        raise ValueError(
            f"left, right: expected one rank, got {q.left.shape[-1]} and {q.right.shape[-1]}"
        )


def to_json(leaf: Any) -> dict[str, Any]:
    """A skeleton as JSON values. Raises ValueError if its format or spec is not quantjax's."""
    match leaf:
        case Buffer():
            return {
                "kind": "array",
                "tensor": leaf.name,
                "dtype": leaf.dtype.name,
                "shape": list(leaf.shape),
                "holder": leaf.holder,
                "digest": leaf.digest,
            }
        case QTensor():
            children = {c: getattr(leaf, c) for c in _CHILDREN}
            later = {c: getattr(leaf, c) for c in _LATER}
            children |= {c: child for c, child in later.items() if child is not None}
            return {
                "kind": "qtensor",
                "format": statics.to_json(leaf.format),
                "shape": list(leaf.shape),
                "block": statics.to_json(leaf.block),
                "packed": statics.to_json(leaf.packed),
                "dtype": np.dtype(leaf.dtype).name,
                "act": statics.to_json(leaf.act),
            } | {c: None if child is None else to_json(child) for c, child in children.items()}
        case Value(value):
            # JSON has no infinity and no NaN; repr is exact for floats.
            shown = repr(value) if isinstance(value, float) else value
            return {"kind": "value", "type": type(value).__name__, "value": shown}
        case Function(name):
            return {"kind": "function", "name": name}
        case Empty(container):
            return {"kind": "empty", "container": container}
    raise TypeError(f"no skeleton: {leaf!r}")


def from_json(data: Any) -> Any:
    """The skeleton that `to_json` wrote. Raises ValueError if it is not in order."""
    match data:
        case {"kind": "array", "tensor": str(name), "holder": str(holder), "digest": str(digest)}:
            return _read_buffer(data, name, holder, digest)
        case {"kind": "qtensor"}:
            return _read_qtensor(data)
        case {"kind": "value", "type": str(kind), "value": value}:
            return Value(_read_value(kind, value))
        case {"kind": "function", "name": str(name)}:
            return Function(name)
        case {"kind": "empty", "container": "dict" | "list" as container}:
            return Empty(container)
    raise ValueError(f"expected an array, qtensor, value, function or empty, got {data!r:.80}")


def _read_value(kind: str, value: Any) -> Any:
    if kind == "float" and isinstance(value, str):
        return float(value)
    if type(value).__name__ != kind or kind not in ("bool", "int", "str", "NoneType"):
        raise ValueError(f"expected a value of type {kind}, got {value!r:.60}")
    return value


def _read_dtype(name: Any) -> np.dtype:
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}; got {name!r:.60}")
    return DTYPES[name]


def _read_shape(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, list) or len(shape) > 32 or not all(map(is_size, shape)):
        raise ValueError(f"shape: expected a list of at most 32 sizes, got {shape!r:.60}")
    if math.prod(max(n, 1) for n in shape) >= 2**56:
        raise ValueError(f"shape: too large, {shape}")
    return tuple(shape)


def _read_buffer(data: dict[str, Any], name: str, holder: str, digest: str) -> Buffer:
    dtype, shape = _read_dtype(data.get("dtype")), _read_shape(data.get("shape"))
    if holder in _KEY_WORDS:
        if dtype != np.uint32 or shape[-1:] != (_KEY_WORDS[holder],):
            raise ValueError(f"expected {holder} keys, uint32[..., {_KEY_WORDS[holder]}]; {shape}")
    elif holder not in PLAIN or holder == "scalar" and shape != ():
        raise ValueError(f"holder: expected jax, numpy or a random generator, got {holder!r:.60}")
    return Buffer(name, dtype, shape, holder, digest)


def _read_qtensor(data: dict[str, Any]) -> QTensor:
    children: dict[str, Any] = {}
    for child in (*_CHILDREN, *_LATER):
        children[child] = None if data.get(child) is None else from_json(data[child])
    packed = data.get("packed")
    if packed is not None:
        match packed:
            case [int(axis), int(length)] if is_size(length) and type(axis) is int:
                packed = (axis, length)
            case _:
                raise ValueError(f"packed: expected [axis, length], got {packed!r:.60}")
    q = QTensor(
        **children,
        format=statics.from_json(data.get("format"), statics.FORMATS, "format"),
        block=statics.from_json(data.get("block"), statics.BLOCK, "block"),
        packed=packed,
        dtype=_read_dtype(data.get("dtype")),
        act=statics.from_json(data.get("act"), statics.SPEC_OR_NONE, "act"),
    )
    check_qtensor(q)
    if list(q.shape) != data.get("shape"):
        raise ValueError(f"shape: {data.get('shape')!r:.60} in words, {list(q.shape)} in its codes")
    return q
