"""Settings every test shares: the device layout, shape checks, hypothesis profile, a key.

This file is imported before any test module, and so before JAX reads the variables below."""

import os
from collections.abc import Callable

# Sharding is tested on eight devices cut from one CPU. What the caller set stays.
_DEVICES = "--xla_force_host_platform_device_count"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# JAX is imported only below, as it reads JAX_PLATFORMS at import.
import hypothesis  # noqa: E402
import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402
from beartype import BeartypeConf, beartype  # noqa: E402

_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int where float is asked


def check_calls(fn: Callable) -> Callable:
    """Enforces the annotations of `fn`, save those of a constructor.

    JAX builds pytrees with shapes, axis numbers or bare objects where arrays will be, so a
    field's annotation holds for users only. Values check themselves in `__post_init__`."""
    return fn if fn.__name__ == "__init__" else _checked(fn)


# Every annotation of quantjax is enforced at each call, shapes included. The hook acts on
# modules imported after it.
jaxtyping.install_import_hook("quantjax", f"{__name__}.check_calls")

# The same cases on every run, so a red test is red for everyone. The first example compiles,
# so time per example says nothing.
hypothesis.settings.register_profile("quantjax", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("quantjax")


@pytest.fixture
def key() -> jax.Array:
    """A fixed random key; split it in the test that needs several."""
    return jax.random.key(0)
