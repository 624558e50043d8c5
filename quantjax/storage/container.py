"""How do named buffers become one file? The safetensors container, written and mapped here.
Layout: 8 bytes of header length, a JSON header, the buffers, https://github.com/huggingface/safetensors.

Its own package is not called because its writer takes all buffers at once and puts metadata in
random order, and its NumPy reader refuses float8. The tests hold both to one another."""

import json
import mmap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from quantjax.storage.errors import CorruptFile, NotQuantjaxFile

MAX_HEADER = 100_000_000  # the format's own limit, in bytes
_ALIGNED = 64  # bytes; what XLA asks of memory that it takes as it is

# Element types that every safetensors reader knows. All others are kept as bytes, U8, with one
# more axis where an element has several.
CODES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "uint16": "U16",
    "int16": "I16",
    "float16": "F16",
    "bfloat16": "BF16",
    "uint32": "U32",
    "int32": "I32",
    "float32": "F32",
    "uint64": "U64",
    "int64": "I64",
    "float64": "F64",
}


class Declared(NamedTuple):
    """What the container says of one tensor."""

    code: str
    shape: tuple[int, ...]


def declare(dtype: np.dtype, shape: tuple[int, ...]) -> Declared:
    """How an array is declared to readers that know the container alone.

    >>> declare(np.dtype(np.int8), (2, 3)), declare(np.dtype(np.complex64), (5,))
    (Declared(code='I8', shape=(2, 3)), Declared(code='U8', shape=(5, 8)))
    """
    code = CODES.get(dtype.name)
    if code is not None:
        return Declared(code, shape)
    return Declared("U8", shape if dtype.itemsize == 1 else (*shape, dtype.itemsize))


class Planned(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    nbytes: int


def rank(name: str, dtype: np.dtype) -> tuple[int, str]:
    """What buffers are sorted by: widest element first, so that all are aligned, then name."""
    return -dtype.itemsize, name


def header_bytes(tensors: Sequence[Planned], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON header, padded to 8 bytes; the buffers follow in their order here."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name, dtype, shape, nbytes in tensors:
        code, declared = declare(dtype, shape)
        offsets = [start, start + nbytes]
        header[name] = {"dtype": code, "shape": list(declared), "data_offsets": offsets}
        start += nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class Mapped(NamedTuple):
    """An open file: metadata, declared tensors, their bytes, mapped and not yet read, and where in
    the file these begin."""

    metadata: dict[str, str]
    declared: dict[str, Declared]
    buffers: dict[str, np.ndarray]
    starts: dict[str, int]


def map_file(path: str, file: BinaryIO) -> Mapped:
    """Maps a file and checks that it is a whole safetensors file, without reading the buffers.

    Raises NotQuantjaxFile if it is none, CorruptFile if it is cut short or contradicts itself.
    """
    size = file.seek(0, 2)
    if size < 10:
        what = "is empty" if size == 0 else f"has only {size} bytes"
        raise NotQuantjaxFile(f"{path}: {what}; expected a file written by quantjax.save.")
    raw = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    length = int.from_bytes(raw[:8].tobytes(), "little")
    if length > MAX_HEADER or raw[8] != ord("{"):
        raise NotQuantjaxFile(
            f"{path}: not a safetensors file: it starts with {raw[:9].tobytes()!r}, expected a "
            f"header length up to {MAX_HEADER} and '{{'. Expected a file written by quantjax.save."
        )
    if 8 + length > size:
        raise CorruptFile(
            f"{path}: truncated: the header takes {8 + length} bytes, the file has {size}. Save it "
            "or copy it again."
        )
    try:
        text = raw[8 : 8 + length].tobytes().decode()
        header = json.loads(text, object_pairs_hook=_without_repeats)
        metadata = dict(_strings(header.pop("__metadata__", {})))
        spans = {name: _span(name, entry) for name, entry in header.items()}
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"{path}: the safetensors header is damaged: {error}") from error
    starts = {name: 8 + length + span.start for name, span in spans.items()}
    return Mapped(metadata, *_cut(path, raw[8 + length :], spans), starts)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(result := dict(pairs)) != len(pairs):
        raise ValueError("a key is there twice")
    return result


def _strings(metadata: Any) -> Iterator[tuple[str, str]]:
    if not isinstance(metadata, dict):
        raise ValueError(f"expected a table of metadata, got {type(metadata).__name__}")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise ValueError(f"metadata {key!r}: expected text, got {value!r:.60}")
        yield key, value


class _Span(NamedTuple):
    declared: Declared
    start: int
    end: int


def is_size(n: Any) -> bool:
    """Whether n, out of a JSON file, is a count."""
    return type(n) is int and 0 <= n < 2**48


def _span(name: str, entry: Any) -> _Span:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r}: expected dtype, shape, data_offsets; got {entry!r:.60}")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    numbers = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    if not isinstance(code, str) or not numbers or not all(map(is_size, shape + offsets)):
        raise ValueError(f"tensor {name!r}: expected a type and sizes, got {entry!r:.60}")
    return _Span(Declared(code, tuple(shape)), *offsets)


def _cut(path: str, data: np.ndarray, spans: dict[str, _Span]) -> tuple[dict, dict]:
    end = 0
    for name, span in sorted(spans.items(), key=lambda item: (item[1].start, item[1].end)):
        if span.start != end or span.end < end:
            raise CorruptFile(
                f"{path}: the safetensors header is damaged: tensor {name!r} starts at byte "
                f"{span.start}, expected {end}."
            )
        end = span.end
    if end != data.size:
        what = "truncated" if end > data.size else "something was appended"
        raise CorruptFile(
            f"{path}: {what}: expected {end} bytes of buffers, got {data.size}. Save it or copy it "
            "again."
        )
    buffers = {name: data[span.start : span.end] for name, span in spans.items()}
    return {name: span.declared for name, span in spans.items()}, buffers


def room_for(count: int) -> np.ndarray:
    """So many bytes of memory, which JAX takes for an array without a copy."""
    room = np.empty(count + _ALIGNED, np.uint8)
    first = -room.ctypes.data % _ALIGNED
    return room[first : first + count]


def read_bytes(file: BinaryIO, start: int, room: np.ndarray) -> np.ndarray:
    """Fills `room` with the bytes of a file from `start` on; gives the part that it filled."""
    file.seek(start)
    return room[: file.readinto(room.data)]  # type: ignore[attr-defined]
