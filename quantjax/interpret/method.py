"""What does a method of post-training quantization see, and what does it give?

A method is a function from one state of the work to the next: it may change the float parameters
without changing what the model computes, or quantize some, or correct what others left."""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from quantjax.fake_quantized import is_quantized
from quantjax.paths import named_leaves


class Journal:
    """What is finished, by name, so that a long run can stop and go on. Mutable: it only grows.

    `state` is a plain tree of arrays that `quantjax.save` stores. on_block(i, state) is called
    after each addition.
    """

    def __init__(
        self,
        state: Mapping[str, Any] | None = None,
        on_block: Callable[[int, dict[str, Any]], Any] | None = None,
        digest: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self._on_block, self._digest = on_block, digest
        self._done: dict[str, Any] = dict((state or {}).get("done", {}))

    @property
    def state(self) -> dict[str, Any]:
        """All that is finished, to be saved."""
        return {"digest": self._digest, "done": dict(self._done)}

    def find(self, name: str) -> Any:
        """What was finished under this name, or None."""
        return self._done.get(name)

    def add(self, name: str, value: Any) -> Any:
        """Notes that it is finished; gives it back."""
        self._done[name] = value
        if self._on_block is not None:
            self._on_block(len(self._done) - 1, self.state)
        return value


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One state of the work.

    apply: the model. batches: a sequence of calibration batches, each the arguments after the
    parameters. reference: float parameters with which `apply` computes what the given ones do.
    tree: the same tree as it is now, leaves in float or QTensors. journal: what a run before this
    one finished. stage: the name of the method among others, which begins its journal's names.
    """

    apply: Callable[..., Any]
    batches: Sequence[tuple[Any, ...]]
    reference: Any
    tree: Any
    journal: Journal = dataclasses.field(default_factory=Journal)
    stage: str = ""

    def done(self, name: str) -> Any:
        """What this stage finished before under this name, or None."""
        return self.journal.find(f"{self.stage}:{name}")

    def note(self, name: str, value: Any) -> Any:
        """Notes what this stage finished; gives it back."""
        return self.journal.add(f"{self.stage}:{name}", value)

    def floats_only(self, who: str) -> None:
        """Raises ValueError, naming a leaf, if some are quantized already."""
        for name, leaf in named_leaves(self.tree)[0]:
            if is_quantized(leaf):
                raise ValueError(
                    f"{who}: {name} is quantized already; it changes float parameters, so it goes "
                    f"before the methods that quantize."
                )


@runtime_checkable
class Method(Protocol):
    """A frozen, hashable value; see `Run`."""

    def __call__(self, run: Run, /) -> Run:
        """The next state of the work."""


def digests(method: Any, params: Any, batches: Sequence[Any]) -> dict[str, np.ndarray]:
    """Hashes of what a saved state belongs to."""
    shown, floats, samples = hashlib.sha256(_shown(method)), hashlib.sha256(), hashlib.sha256()
    for name, leaf in named_leaves(params)[0]:
        floats.update(f"{name}{type(leaf).__name__}".encode())
        for array in jax.tree.leaves(leaf):
            _update(floats, array)
    for batch in batches:
        samples.update(b"batch")
        for array in jax.tree.leaves(batch):
            _update(samples, array)
    found = {"method": shown, "parameters": floats, "batches": samples}
    return {name: np.frombuffer(sha.digest(), np.uint8) for name, sha in found.items()}


def _shown(value: Any) -> bytes:
    """How it shows itself, but for addresses, which the next process does not share."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value)).encode()


def _update(sha: Any, leaf: Any) -> None:
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    values = np.asarray(leaf)
    sha.update(f"{values.shape}{values.dtype}".encode())
    sha.update(values.tobytes() if values.ndim else _shown(leaf))


def journal_of(
    state: Mapping[str, Any] | None,
    on_block: Callable[[int, dict[str, Any]], Any] | None,
    method: Any,
    params: Any,
    batches: Sequence[Any],
) -> Journal:
    """The journal of a run. Raises ValueError if `state` is of another method, model or data."""
    if state is None and on_block is None:
        return Journal()
    own = digests(method, params, batches)
    if state is not None:
        before = state.get("digest")
        before = before if isinstance(before, Mapping) else {}
        differ = [k for k, v in own.items() if not np.array_equal(np.asarray(before.get(k)), v)]
        if differ:
            raise ValueError(
                f"calibrate: state= is of another run: it differs in {', '.join(differ)}. It can "
                f"only go on with those that it began with."
            )
    return Journal(state, on_block, own)
