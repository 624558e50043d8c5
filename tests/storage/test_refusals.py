"""Is a tree that cannot be stored, or does not fit `like`, refused by the name of the leaf?"""

import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantjax import storage
from quantjax.formats import IntFormat
from quantjax.observers import absmax
from quantjax.qtensor import QTensor
from quantjax.spec import QuantSpec
from quantjax.storage import load, save

from .trees import ACT, BESIDE, normal, quantized


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
        (quantized(normal(4, 6), act=ACT), "expected act QuantSpec"),
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
        (replace(BESIDE, input_scale=jnp.ones((3, 4))), r"input_scale: expected axes of \(3, 4, 5"),
        (replace(BESIDE, input_scale=jnp.ones((1, 4, 1))), "input_scale: .* along the first 1"),
        (replace(BESIDE, input_scale=jnp.ones((3, 4, 1), int)), "input_scale: expected floats"),
        (replace(BESIDE, right=None), "left, right: expected both low-rank factors"),
        (replace(BESIDE, right=jnp.ones((3, 1, 5, 3))), "expected one rank, got 2 and 3"),
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


def test_observers_of_the_user_are_refused(tmp_path):
    class Mine(type(absmax())):
        pass

    q = quantized(normal(4, 4), act=QuantSpec(format=IntFormat(8), observer=Mine()))
    with pytest.raises(storage.CannotStore, match=r"head/w.*Mine.*one of .*percentile"):
        save(tmp_path / "q", {"head": {"w": q}})
