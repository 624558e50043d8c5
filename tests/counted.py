"""How often is a jitted function traced? Once, if it compiles once. Its own `_cache_size` does not
say so: JAX shares the place among all functions, and drops what others push out."""

from collections.abc import Callable
from typing import Any

import jax


class Counted:
    """`jax.jit(fn)` that counts its traces."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.traces = 0
        self._fn, self._jitted = fn, jax.jit(self._traced)

    def _traced(self, *args: Any) -> Any:
        self.traces += 1
        return self._fn(*args)

    def __call__(self, *args: Any) -> Any:
        return self._jitted(*args)
