"""Is a damaged, newer or foreign file refused with words that say which?"""

import numpy as np
import pytest
from safetensors.numpy import save_file

from quantjax import storage
from quantjax.storage import CorruptFile, NotQuantjaxFile, StorageError, load, read_header


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
