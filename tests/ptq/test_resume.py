"""Does a run that was stopped after any block go on to the same file, byte for byte?"""

import functools
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax import ptq
from quantjax.interpret.method import digests
from tests.daily import daily

BLOCKS = ("in", "layers", "out")


def network(p: Any, x: jax.Array) -> jax.Array:
    """A layer, two that a scan stacks, and a head."""
    x = jnp.tanh(x @ p["in"]["kernel"] + p["in"]["bias"])
    x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"]["kernel"])[0]
    return x @ p["out"]["kernel"]


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {  # of one shape, so that little is compiled
    "in": {"kernel": normal(8, 8), "bias": normal(8)},
    "layers": {"kernel": normal(2, 8, 8)},
    "out": {"kernel": normal(8, 8, seed=1)},
}
BATCHES = [normal(16, 8, seed=1), normal(16, 8, seed=2)]
METHODS = {  # and how much is noted on the way: the layers that a scan takes off, each
    "gptq": (ptq.gptq("w3g4"), 4),
    "brecq": (ptq.brecq("w3", blocks=BLOCKS, steps=4), 4),
    "qdrop": (ptq.qdrop("w4a4", blocks=BLOCKS, steps=4, loss=ptq.own_labels), 4),
    "awq": (ptq.awq("w4"), 5),  # the scales, too
    "chain": (qj.chain(ptq.gptq("w3"), ptq.bias_correction()), 5),
}


def run(name: str, file: Path, **options: Any) -> bytes:
    qj.save(file, qj.calibrate(network, PARAMS, BATCHES, METHODS[name][0], **options))
    return file.read_bytes()


@pytest.mark.parametrize("name", daily(METHODS, ["gptq", "brecq"]))
@pytest.mark.filterwarnings("ignore:.*no bias of its own:UserWarning")
def test_goes_on_from_every_block_to_the_same_file(name, tmp_path):
    call, blocks = functools.partial(run, name, tmp_path / "target"), METHODS[name][1]
    want = call(on_batch=lambda i, state: qj.save(tmp_path / f"state{i}", state))
    assert len(list(tmp_path.glob("state*"))) == blocks
    for last in range(blocks):
        again: list[int] = []
        state = qj.load(tmp_path / f"state{last}")
        assert call(state=state, on_batch=lambda i, s, again=again: again.append(i)) == want
        assert again == list(range(last + 1, blocks))  # what was finished is not done again


def test_a_state_does_not_depend_on_where_functions_lie():
    def method() -> Any:
        def loss(logits, key):
            return logits.sum()

        return ptq.brecq("w3", loss=loss)

    a, b = method(), method()
    assert repr(a) != repr(b)
    a, b = (digests(m, PARAMS, [(jax.random.key(0), x) for x in BATCHES]) for m in (a, b))
    jax.tree.map(np.testing.assert_array_equal, a, b)


KILLED = """
import os, signal, sys
import quantjax as qj
from tests.ptq.test_resume import BATCHES, METHODS, PARAMS, network
def kill(i, state):
    qj.save(sys.argv[1], state)
    if i == 1:
        os.kill(os.getpid(), signal.SIGKILL)
qj.calibrate(network, PARAMS, BATCHES, METHODS[sys.argv[2]][0], on_batch=kill)
"""


@pytest.mark.full
@pytest.mark.parametrize("name", ["gptq", "qdrop"])
def test_goes_on_after_a_process_that_was_killed(name, tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "state"), name]
    assert subprocess.run(command, timeout=300).returncode == -signal.SIGKILL
    state, again = qj.load(tmp_path / "state"), []
    call = functools.partial(run, name, tmp_path / "target")
    assert call(state=state, on_batch=lambda i, s: again.append(i)) == call()
    assert again == [2, 3]
