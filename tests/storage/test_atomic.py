"""Does saving leave one whole file, old or new, whatever happens meanwhile or after?"""

import errno
import os
import threading
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from quantjax import storage
from quantjax.storage import load, save

from .trees import TREE, assert_same


def test_saves_at_the_same_time_leave_one_whole_file(tmp_path):
    trees = [{"w": jnp.full((50, 50), i)} for i in range(4)]
    threads = [threading.Thread(target=save, args=(tmp_path / "q", tree)) for tree in trees]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert os.listdir(tmp_path) == ["q"]
    value = int(load(tmp_path / "q")["w"][0, 0])
    assert_same(load(tmp_path / "q"), trees[value])


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
    assert_same(load(whole), TREE)


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
    assert_same(loaded, x)
    loaded["numpy"][0] = 1  # and NumPy arrays may be written to
