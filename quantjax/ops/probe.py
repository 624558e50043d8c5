"""Which form of the integer product is fastest on this CPU, with this jaxlib?

Asked of the machine, as no table could be kept: u8s8 does not compile on some versions of jaxlib,
is scalar code on x86 without VNNI, and where both exist the better one depends on the version."""

import contextlib
import contextvars
import dataclasses
import functools
import threading
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from quantjax.ops.forms import FORMS

_SHAPE = (64, 512, 512)  # rows, sum, columns: large enough to thread, and 20 MFLOP for the slowest
_ROUNDS = 9
_PLAIN = (((1,), (0,)), ((), ()))

_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("form", default=None)
_lock = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Probe:
    """The form that was chosen, the milliseconds of each that works, and why others do not."""

    form: str
    milliseconds: tuple[tuple[str, float], ...] = ()
    failed: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        times = [f"{form} {ms:.3f} ms" for form, ms in self.milliseconds]
        return f"{self.form} ({', '.join([*times, *(f'{f}: {why}' for f, why in self.failed)])})"


def probe() -> Probe:
    """Measures on first use, once per process, in under a second; later the same value.

    A form that does not compile, or whose product of 64 x 512 x 512 codes is not NumPy's to the
    last bit, can not win. Without a CPU backend s8s8 is taken unmeasured. It runs in a thread of
    its own, so it may be called while a caller's function is traced or lowered.
    """
    with _lock:
        return _once()


@functools.cache
def _once() -> Probe:
    found: list[Probe | BaseException] = []

    def run() -> None:
        try:
            found.append(_measure())
        except BaseException as error:  # raised again below, in the thread that asked
            found.append(error)

    thread = threading.Thread(target=run, name="quantjax probe")
    thread.start()
    thread.join()
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def _measure() -> Probe:
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        return Probe("s8s8", failed=tuple((form, _line(error)) for form in FORMS))
    rng = np.random.default_rng(0)
    rows, length, columns = _SHAPE
    x = rng.integers(-128, 128, (rows, length)).astype(np.int8)
    w = rng.integers(-128, 128, (length, columns)).astype(np.int8)
    x[0], w[:, 0] = 127, -128  # the largest sums
    expected = (x.astype(np.float64) @ w.astype(np.float64)).astype(np.int32)
    with jax.default_device(device):
        args = jnp.asarray(x), jnp.asarray(w)
        runs, failed = {}, []
        for form, product in FORMS.items():
            try:
                run = jax.jit(product, static_argnums=2).lower(*args, _PLAIN).compile()
                if not np.array_equal(run(*args), expected):
                    raise ArithmeticError("wrong sums")
                runs[form] = run
            except Exception as error:  # whatever the compiler raises rules the form out
                failed.append((form, _line(error)))
        best = dict.fromkeys(runs, float("inf"))
        for _ in range(_ROUNDS):  # in turn, so that a busy moment meets all of them
            for form, run in runs.items():
                start = time.perf_counter()
                run(*args).block_until_ready()
                best[form] = min(best[form], time.perf_counter() - start)
    if not best:
        raise RuntimeError(f"quantjax: no form of the integer product works here: {failed}")
    times = tuple((form, seconds * 1e3) for form, seconds in best.items())
    return Probe(min(best, key=best.__getitem__), times, tuple(failed))


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def forced() -> str | None:
    """The form that `force` asks for here, or None."""
    return _forced.get()


@contextlib.contextmanager
def force(form: str) -> Iterator[None]:
    """Takes `form` for the products traced inside, whatever the probe says: for tests.

    A function that was jitted and called before keeps what it was compiled with.
    """
    if form not in FORMS:
        raise ValueError(f"force: expected one of {list(FORMS)}, got {form!r}.")
    token = _forced.set(form)
    try:
        yield
    finally:
        _forced.reset(token)
