"""What does a method of post-training quantization see, and what does it give?

A method is a function from one state of the work to the next: it may change the float parameters
without changing what the model computes, or quantize some, or correct what others left."""

import dataclasses
import hashlib
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
        digest: np.ndarray | None = None,
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


def digest(method: Any, params: Any, batches: Sequence[Any]) -> np.ndarray:
    """A hash of what a saved state belongs to: the method, the parameters, the first batch."""
    sha = hashlib.sha256(repr(method).encode())
    for name, leaf in named_leaves(params)[0]:
        sha.update(f"{name}{type(leaf).__name__}".encode())
        for array in jax.tree.leaves(leaf):
            sha.update(f"{np.shape(array)}{np.asarray(array).dtype}".encode())
            sha.update(np.ascontiguousarray(array).tobytes())
    for array in jax.tree.leaves(batches[:1]):
        sha.update(f"{len(batches)}{np.shape(array)}".encode())
        sha.update(
            np.ascontiguousarray(array).tobytes() if np.ndim(array) else repr(array).encode()
        )
    return np.frombuffer(sha.digest(), np.uint8)


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
    own = digest(method, params, batches)
    if state is not None and not np.array_equal(np.asarray(state.get("digest")), own):
        raise ValueError(
            "calibrate: state= is of another method, other parameters or other batches; it can "
            "only go on with those that it began with."
        )
    return Journal(state, on_block, own)
