"""Does a damaged, foreign or half-written file ever pass, crash the reader, or cost the old one?"""

import errno
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from quantjax import storage
from quantjax.formats import Codebook, FloatFormat, IntFormat
from quantjax.observers import percentile
from quantjax.qtensor import QTensor
from quantjax.spec import Granularity, QuantSpec
from quantjax.storage import CorruptFile, NotQuantjaxFile, StorageError, load, read_header, save
from quantjax.storage.container import map_file
from quantjax.storage.file import _digest

HEADER, DIGEST, VERSION = "quantjax.header", "quantjax.digest", "quantjax.version"


def codes(*shape: int, dtype: Any = jnp.uint8) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, 100, shape), dtype)


ACT = QuantSpec(format=IntFormat(8), block=Granularity.ROW, observer=percentile(99.9))
NESTED = QTensor(codes(3, 4), jnp.ones((1, 1)), format=FloatFormat(4, 3), block=(None, None))
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


def same(a: Any, b: Any) -> bool:
    """Equal structure and bits."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if type(x) is not type(y) or getattr(x, "dtype", 0) != getattr(y, "dtype", 0):
            return False
        if np.shape(x) != np.shape(y) or not np.array_equal(np.asarray(x), np.asarray(y)):
            return False
    return True


@pytest.fixture
def whole(tmp_path) -> Path:
    save(tmp_path / "whole", TREE, metadata={"step": "7"})
    assert same(load(tmp_path / "whole"), TREE)
    return tmp_path / "whole"


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to three small damages; more in the header, where one byte can mean anything."""
    out = bytearray(data)
    header = 8 + int.from_bytes(data[:8], "little")
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        end = rng.choice([9, header, len(out)])
        i, n = rng.randrange(min(end, len(out)) or 1), rng.randrange(1, 9)
        match rng.randrange(10):
            case 0 | 1 if out:
                out[i] ^= 1 << rng.randrange(8)
            case 2 if out:
                out[i] = rng.choice(b'0123456789 "{}[],:-nul\\\t\x00\xff')
            case 3:
                out[i:i] = rng.randbytes(n)
            case 4:
                del out[i : i + n]
            case 5:
                del out[rng.randrange(len(out) + 1) :]
            case 6:
                j = rng.randrange(len(out) or 1)
                out[i : i + n], out[j : j + n] = out[j : j + n], out[i : i + n]
            case 7:
                out += out[i : i + n]
            case _:  # a digit for a digit: the header stays JSON and says something else
                digits = [k for k, byte in enumerate(out[:header]) if chr(byte).isdigit()]
                if digits:
                    out[rng.choice(digits)] = rng.choice(b"0123456789")
    return bytes(out)


def test_no_mutation_crashes_or_passes_as_another_tree(whole):
    data, rng = whole.read_bytes(), random.Random(0)
    refused: dict[str, int] = {}
    changed = 0
    for _ in range(2500):
        mutated = mutate(data, rng)
        changed += mutated != data
        whole.write_bytes(mutated)
        try:
            result = load(whole)
        except StorageError as error:
            assert str(whole) in str(error)
            refused[type(error).__name__] = refused.get(type(error).__name__, 0) + 1
            continue
        assert same(result, TREE) and read_header(whole).metadata == {"step": "7"}
    assert changed > 2400 and sum(refused.values()) > 2400
    assert {"CorruptFile", "NotQuantjaxFile"} <= set(refused)


def test_every_single_byte_counts(whole):
    # One byte after the other; only white space of the header may change without a word.
    data = whole.read_bytes()
    for i in range(0, len(data), 3):
        whole.write_bytes(data[:i] + bytes([data[i] ^ 0x04]) + data[i + 1 :])
        try:
            assert same(load(whole), TREE)
            assert chr(data[i]).isspace()
        except StorageError:
            continue


def reseal(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Edits our header (or replaces it, by what `edit` returns) and makes its digest right again:
    a forger, not an accident."""
    with open(path, "rb") as file:
        raw = file.read()
    length = 8 + int.from_bytes(raw[:8], "little")
    container = json.loads(raw[8:length])
    metadata = container["__metadata__"]
    header = json.loads(metadata[HEADER])
    result = edit(header)
    metadata[HEADER] = json.dumps(header if result is None else result)
    metadata[DIGEST] = _digest(metadata)
    text = json.dumps(container).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[length:])


def leaf(header: dict[str, Any], name: str = "a") -> dict[str, Any]:
    return next(e for e in header["leaves"] if e["path"][0] == ["dict", name])


def drop(node: dict[str, Any], key: str) -> None:
    del node[key]


def setter(*keys: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(header: dict[str, Any]) -> None:
        node = leaf(header)
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = value

    return edit


FORGED = {
    "no leaves": (lambda h: {}, "expected a list of leaves"),
    "not a table": (lambda h: 3, "expected a list of leaves"),
    "leaf is no table": (lambda h: h["leaves"].append(3), "expected a leaf"),
    "no path": (lambda h: drop(h["leaves"][0], "path"), "expected a list of at most"),
    "path of floats": (setter("path", value=[["dict", 1.5]]), "expected .dict . attr"),
    "deep path": (setter("path", value=[["seq", 0]] * 999), "expected a list of at most 256"),
    "two of one path": (setter("path", value=[["attr", "c"]]), "two leaves have one path"),
    "kind": (setter("kind", value="pickle"), "a: expected an array, qtensor"),
    "format name": (setter("format", "type", value="os.system"), "format: expected IntFormat.*os"),
    "format is text": (setter("format", value="int4"), "format: expected IntFormat"),
    "format field": (setter("format", "bits", value="4"), "IntFormat.bits: expected int; got '4'"),
    "format bits": (setter("format", "bits", value=99), "bits must be an integer from 1 to 8"),
    "format bool": (setter("format", "bits", value=True), "IntFormat.bits: expected int; got True"),
    "format enum": (setter("format", "levels", value="half "), "levels: expected 'full' or"),
    "more fields": (setter("format", "hi", value=1), "unknown fields .'hi'"),
    "fewer fields": (lambda h: drop(leaf(h)["format"], "bits"), "missing fields .'bits'"),
    "observer": (setter("act", "observer", "q", value=1.0), r"q must be in \(50, 100\]"),
    "observer name": (setter("act", "observer", "type", value="eval"), "observer: expected absmax"),
    "act group": (setter("act", "group", value=-1), "group must be a positive integer"),
    "act block": (setter("act", "block", value=[0]), "block: expected Block, 'channel' or"),
    "block": (setter("block", value=[2.0, 1]), "block: expected Block"),
    "long block": (setter("block", value=[1, 1, 1]), "block .* more axes"),
    "other block": (setter("block", value=[3, 1]), r"scale: expected one per block, \(2, 4\)"),
    "axis": (setter("packed", value=[1, 6]), "packed .* does not fit"),
    "axis too low": (setter("packed", value=[-3, 6]), "packed .* does not fit"),
    "length": (setter("packed", value=[-2, 7]), "7 codes of 4 bits take 4 bytes"),
    "negative length": (setter("packed", value=[-2, -6]), "packed: expected .axis, length"),
    "packed text": (setter("packed", value="-2"), "packed: expected .axis, length"),
    "logical shape": (setter("shape", value=[6, 5]), r"shape: \[6, 5\] in words"),
    "dtype": (setter("dtype", value="object"), "dtype: expected one of bool"),
    "no codes": (setter("qvalue", value=None), "qvalue: expected codes"),
    "shape": (setter("qvalue", "shape", value=[4, 3]), "a: "),
    "huge shape": (setter("qvalue", "shape", value=[2**40, 2**40]), "shape: too large"),
    "endless shape": (setter("qvalue", "shape", value=[10**30, 0]), "shape: expected a list"),
    "negative shape": (setter("qvalue", "shape", value=[-3, -4]), "shape: expected a list"),
    "deep shape": (setter("qvalue", "shape", value=[1] * 99), "at most 32 sizes"),
    "buffer": (setter("qvalue", "tensor", value="nowhere"), "name different buffers.*nowhere"),
    "shared buffer": (setter("qvalue", "tensor", value="c.qvalue"), "name different buffers"),
    "buffer type": (setter("scale", "scale", "dtype", value="int32"), "'a.scale.scale': expected"),
    "holder": (setter("qvalue", "holder", value="torch"), "holder: expected jax"),
    "key holder": (setter("scale", "scale", "holder", value="rbg"), "expected rbg keys"),
    "no digest": (lambda h: drop(leaf(h)["qvalue"], "digest"), "qvalue|expected an array"),
    "digest": (setter("qvalue", "digest", value="0" * 32), "buffer 'a.qvalue' was changed"),
    "value": (lambda h: h["leaves"][3].update(type="int"), "expected a value of type int"),
    "float": (lambda h: h["leaves"][4].update(value="x"), "could not convert"),
    "scale of text": (
        setter("scale", value={"kind": "value", "type": "str", "value": "x"}),
        "scale: expected an array",
    ),
    "codebook": (lambda h: leaf(h, "c")["format"].update(learned_bits=3), "codebook|take"),
    "levels": (lambda h: leaf(h, "c")["format"].update(values="AAA"), "values: expected doubles"),
    "odd levels": (lambda h: leaf(h, "c")["format"].update(values="AAAA"), "values: expected doub"),
    "list of levels": (lambda h: leaf(h, "c")["format"].update(values=[0.0]), "expected Values"),
    "no codebook": (lambda h: leaf(h, "c").update(codebook=None), "codebook: .* needs one"),
    "deep": (setter("scale", value=json.loads('{"scale":' * 400 + "1" + "}" * 400)), "a: "),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_forged_headers_are_refused_by_their_content(whole, name):
    edit, message = FORGED[name]
    reseal(whole, edit)
    with pytest.raises(CorruptFile, match=message) as caught:
        load(whole)
    assert str(whole) in str(caught.value)


def test_endless_nesting_is_refused(whole):
    # Written by hand: Python's own writer would not.
    with open(whole, "rb") as file:
        metadata = map_file(str(whole), file).metadata
    for depth in (10, 100_000):
        metadata[HEADER] = '{"leaves":' + "[" * depth + "]" * depth + "}"
        metadata[DIGEST] = _digest(metadata)
        text = json.dumps({"__metadata__": metadata}).encode()
        whole.write_bytes(len(text).to_bytes(8, "little") + text)
        with pytest.raises(CorruptFile):
            load(whole)
        text = b'{"a":' + b"[" * depth + b"]" * depth + b"}"
        whole.write_bytes(len(text).to_bytes(8, "little") + text)
        with pytest.raises(CorruptFile):
            load(whole)


def test_forged_headers_at_random_raise_our_errors_alone(whole):
    data, rng = whole.read_bytes(), random.Random(1)
    pool = [
        None,
        True,
        -1,
        0,
        3,
        2**70,
        1.5,
        "",
        "int8",
        "dict",
        [],
        [[]],
        [-2, 6],
        {},
        {"type": "mse"},
    ]

    def places(node: Any) -> list[tuple[Any, Any]]:
        items = node.items() if isinstance(node, dict) else enumerate(node)
        found = [(node, key) for key, _ in items]
        for child in node.values() if isinstance(node, dict) else node:
            found += places(child) if isinstance(child, dict | list) else []
        return found

    def edit(header: dict[str, Any]) -> None:
        node, key = rng.choice(places(header))
        node[key] = rng.choice(pool)

    refused = 0
    for _ in range(600):
        whole.write_bytes(data)
        reseal(whole, edit)
        try:
            load(whole)
        except StorageError:
            refused += 1
    assert refused > 400


def test_a_file_rewritten_by_another_tool_is_the_same_tree(tmp_path):
    # The digest is over what the file says, not over the order in which it says it.
    tree = {"w": TREE["a"], "x": jnp.arange(3.0), "y": jnp.arange(4)}
    save(tmp_path / "q", tree, metadata={"step": "7"})
    with safe_open(tmp_path / "q", "np") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    save_file(
        arrays, tmp_path / "other", {key: metadata[key] for key in reversed(sorted(metadata))}
    )
    assert (tmp_path / "q").read_bytes() != (tmp_path / "other").read_bytes()
    assert same(load(tmp_path / "other"), tree)
    assert read_header(tmp_path / "other").metadata == {"step": "7"}


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, 0.5, 0.9, -1])
def test_truncated_files(whole, keep):
    data = whole.read_bytes()
    whole.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(StorageError, match="truncated|empty|only|not a safetensors") as caught:
        load(whole)
    assert isinstance(caught.value, CorruptFile if keep in (100, 0.5, 0.9, -1) else NotQuantjaxFile)


def test_what_readers_could_take_in_two_ways_is_refused(whole):
    data = whole.read_bytes()
    whole.write_bytes(data + b"\0")
    with pytest.raises(CorruptFile, match="something was appended: expected .* bytes"):
        load(whole)
    for header, message in [
        (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{}}', "a key is there twice"),
        (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}', "starts at byte 1, expected 0"),
        (b'{"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}}', "expected a type and sizes"),
        (b'{"__metadata__":{"a":1}}', "expected text, got 1"),
    ]:
        whole.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
        with pytest.raises(CorruptFile, match=message):
            load(whole)


def test_a_damaged_buffer_is_named(whole):
    data = bytearray(whole.read_bytes())
    data[-1] ^= 1
    whole.write_bytes(data)
    with pytest.raises(CorruptFile, match=r"buffer '.*' was changed or damaged.*copy it again"):
        load(whole)
    assert read_header(whole).metadata == {"step": "7"}  # which reads no buffers


def test_metadata_is_covered(whole):
    data = whole.read_bytes()
    assert data.count(b'"step":"7"') == 1
    whole.write_bytes(data.replace(b'"step":"7"', b'"step":"8"'))
    for read in (load, read_header):
        with pytest.raises(CorruptFile, match="the header was changed or damaged"):
            read(whole)


def test_newer_version(whole):
    data = whole.read_bytes()
    whole.write_bytes(data.replace(b'"quantjax.version":"1"', b'"quantjax.version":"2"'))
    with pytest.raises(
        storage.NewerVersion, match="version 2; this quantjax knows up to 1. Upgrade"
    ):
        load(whole)
    whole.write_bytes(data.replace(b'"quantjax.version":"1"', b'"quantjax.version":"0"'))
    with pytest.raises(CorruptFile, match="expected format version 1, got '0'"):
        load(whole)


def test_foreign_files(tmp_path):
    path = tmp_path / "f"
    save_file({"w": np.ones(3)}, path)
    with pytest.raises(NotQuantjaxFile, match="not one written by quantjax.save; .*safetensors"):
        load(path)
    for data in (b"", b"PK\x03\x04" + bytes(100), b"\x93NUMPY" + bytes(100), b"hello world, hello"):
        path.write_bytes(data)
        with pytest.raises(NotQuantjaxFile):
            load(path)
    with pytest.raises(IsADirectoryError):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("where", ["fetch", "write", "sync", "replace", "interrupt"])
def test_a_crash_while_saving_leaves_the_old_file_whole(whole, monkeypatch, where):
    before = whole.read_bytes()
    error: BaseException = OSError(errno.ENOSPC, "No space left on device")
    if where == "interrupt":
        error = KeyboardInterrupt()

    def fail(*args: Any) -> None:
        raise error

    bytes_of, calls = storage.leaves.bytes_of, []

    def fail_late(buffer: Any) -> Any:
        calls.append(buffer)
        return fail() if len(calls) == 3 else bytes_of(buffer)

    if where in ("fetch", "interrupt"):
        monkeypatch.setattr(storage.leaves, "bytes_of", fail_late)
    elif where == "write":  # after the buffers, when the header goes to the front
        monkeypatch.setattr(storage.leaves, "digest_of", fail)
    else:
        monkeypatch.setattr(os, {"sync": "fsync", "replace": "replace"}[where], fail)
    with pytest.raises(type(error)):
        save(whole, {"other": jnp.ones((100, 100)), "x": [jnp.ones(2), jnp.ones(3)]})
    monkeypatch.undo()
    assert whole.read_bytes() == before
    assert os.listdir(whole.parent) == [whole.name]
    assert same(load(whole), TREE)


def test_where_a_file_cannot_be_written(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no directory .*; make it first"):
        save(tmp_path / "no" / "q", 1)
    with pytest.raises(IsADirectoryError, match="expected the name of a file"):
        save(tmp_path, 1)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(storage.CannotStore, match="neither a file nor new"):
        save(tmp_path / "pipe", 1)


def test_permissions_follow_the_umask_or_the_old_file(tmp_path):
    old = os.umask(0o027)
    try:
        save(tmp_path / "q", 1)
        assert (tmp_path / "q").stat().st_mode & 0o777 == 0o640
        (tmp_path / "q").chmod(0o604)
        save(str(tmp_path / "q"), 2)
        assert (tmp_path / "q").stat().st_mode & 0o777 == 0o604
    finally:
        os.umask(old)


def test_links_are_followed(tmp_path):
    save(tmp_path / "step1", 1)
    (tmp_path / "latest").symlink_to("step1")
    save(tmp_path / "latest", 2)
    assert (tmp_path / "latest").is_symlink() and load(tmp_path / "step1") == 2


@pytest.mark.parametrize("pad", range(0, 64, 8))
def test_the_result_does_not_live_in_the_file(tmp_path, pad):
    # On the CPU, JAX shares memory with aligned NumPy arrays; mapped files must not be shared.
    x = {"jax": jnp.arange(4096.0), "numpy": np.arange(4096.0)}
    save(tmp_path / "q", x, metadata={"pad": " " * pad})
    loaded = load(tmp_path / "q")
    with open(tmp_path / "q", "r+b") as file:
        file.write(b"\xff" * os.path.getsize(tmp_path / "q"))
    assert same(loaded, x)
    loaded["numpy"][0] = 1  # and NumPy arrays may be written to
