"""Is a forged header, its digest made right again, refused by what it says?"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantjax.storage import CorruptFile, StorageError, load
from quantjax.storage.container import map_file
from quantjax.storage.header import digest_of

HEADER, DIGEST = "quantjax.header", "quantjax.digest"


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
    metadata[DIGEST] = digest_of(metadata)
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
        metadata[DIGEST] = digest_of(metadata)
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
