"""How much memory does a call take at its peak? Linux keeps a high-water mark that can be reset."""

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


def with_peak(call: Callable[[], Any]) -> tuple[Any, int | None]:
    """What `call` returns, waited for, and by how many bytes the resident memory of the process
    grew at most meanwhile; None where the system keeps no mark.

    What the allocator held free before is given back first, so that it does not hide the growth;
    imports and compilation that the call causes count."""
    if sys.platform != "linux":
        return jax.block_until_ready(call()), None
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    result = jax.block_until_ready(call())
    return result, _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field))) * 1024
