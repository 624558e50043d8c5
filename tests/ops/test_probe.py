"""Does the probe choose the fastest form that is right, once, and not at import?"""

import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantjax import ops
from quantjax.ops.forms import FORMS, signed_dot

probe_module = sys.modules["quantjax.ops.probe"]  # the package's attribute is the function
PLAIN = (((1,), (0,)), ((), ()))


@pytest.fixture
def fresh():
    """As if nothing had been measured, and again afterwards."""
    probe_module._once.cache_clear()
    yield
    probe_module._once.cache_clear()


def test_the_fastest_form_that_works_is_chosen():
    found = ops.probe()
    times = dict(found.milliseconds)
    assert found.form == min(times, key=times.get) and ops.probe() is found
    assert {*times, *dict(found.failed)} == set(FORMS)
    assert hash(found) == hash(ops.probe()) and str(found).startswith(f"{found.form} (")


def test_a_form_with_wrong_sums_or_that_does_not_compile_can_not_win(fresh, monkeypatch):
    def fails(*_):
        raise NotImplementedError("no such kernel\nand more")

    wrong = lambda x, w, numbers: signed_dot(x, w, numbers) + (w[0, 0] == -128)  # noqa: E731
    monkeypatch.setitem(FORMS, "s8s8", wrong)
    monkeypatch.setitem(FORMS, "u8s8", fails)
    found = ops.probe()
    assert found.form == "float32"
    failed = dict(found.failed)
    assert failed["s8s8"] == "ArithmeticError: wrong sums"
    assert failed["u8s8"] == "NotImplementedError: no such kernel"


def test_no_form_at_all_is_an_error(fresh, monkeypatch):
    for form in FORMS:
        monkeypatch.setitem(FORMS, form, lambda *_: None)
    with pytest.raises(RuntimeError, match="no form of the integer product works here"):
        ops.probe()


def test_it_runs_once_for_many_threads(fresh, monkeypatch):
    calls = []
    monkeypatch.setattr(probe_module, "_measure", lambda: calls.append(0) or ops.Probe("s8s8"))
    threads = [threading.Thread(target=ops.probe) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [0]


def test_it_sees_nothing_of_the_caller(fresh):
    """Called while a function is lowered inside vmap, jit and float64 mode."""
    x, w = jnp.ones((2, 3, 8), jnp.int8), jnp.ones((8, 4), jnp.int8)
    with jax.enable_x64(True), jax.disable_jit(False), jax.debug_nans(True):
        run = jax.jit(
            jax.vmap(lambda x: jax.jit(ops.integer_dot_general, static_argnums=2)(x, w, PLAIN))
        )
        np.testing.assert_array_equal(run(x), 8)
    assert not dict(ops.probe().failed)


def test_without_a_cpu_backend_nothing_is_measured(fresh, monkeypatch):
    def local_devices(backend):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "local_devices", local_devices)
    found = ops.probe()
    assert (
        found.form == "s8s8" and dict(found.failed)["u8s8"] == "RuntimeError: Unknown backend cpu"
    )


def test_import_measures_nothing_and_the_first_product_does_in_a_second():
    code = """
import sys, threading, time
import quantjax, jax, jax.numpy as jnp
module = sys.modules["quantjax.ops.probe"]
assert module._once.cache_info().currsize == 0
assert not jax._src.xla_bridge.backends_are_initialized()
x = jnp.ones((2, 2), jnp.int8)
x.block_until_ready()
start = time.perf_counter()
quantjax.ops.probe()
print(time.perf_counter() - start)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 5  # 0.4 s alone on two cores; loaded machines are slower
