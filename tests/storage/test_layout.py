"""Is the file what it was yesterday, small, and readable by other tools?"""

import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from quantjax import storage
from quantjax.formats import ExponentFormat, IntFormat, apot, e2m1, e4m3
from quantjax.observers import percentile
from quantjax.qtensor import QTensor
from quantjax.spec import Granularity, QuantSpec
from quantjax.storage import load, read_header, save

from .trees import TREE, assert_same, normal, quantized

GOLDEN = Path(__file__).parents[1] / "golden" / "storage.safetensors"


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
    assert_same(load(tmp_path / "other"), tree)
    assert read_header(tmp_path / "other").metadata == {"step": "7"}


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
