"""How sparse is a network at which step? Ever less is added, as ever less is left to go.
Zhu and Gupta, "To prune, or not to prune", 2017, arXiv:1710.01878, equation 1."""

import dataclasses
from typing import Any

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Cubic:
    """The share of weights that is pruned at a step: with t = 0 at `start` and 1 at `end`,
    s = final + (initial - final) (1 - t)^3; `initial` before and `final` after.

    every: s changes at every so many steps from `start` on, when masks are found anew. Takes whole
    numbers and traced ones. Raises ValueError for sparsities outside [0, 1), an end that does not
    come after the start, and steps between them that `every` does not divide.

    >>> schedule = Cubic(0.8, end=100, every=10)
    >>> [round(schedule(step), 4) for step in (0, 9, 50, 100, 1000)]
    [0.0, 0.0, 0.7, 0.8, 0.8]
    """

    final: float
    end: int
    start: int = 0
    every: int = 1
    initial: float = 0.0

    def __post_init__(self) -> None:
        for name in ("initial", "final"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"Cubic: {name} must be a sparsity in [0, 1), got {getattr(self, name)}."
                )
        if not self.start < self.end:
            raise ValueError(f"Cubic: end {self.end} must come after start {self.start}.")
        if self.every < 1 or (self.end - self.start) % self.every:
            raise ValueError(
                f"Cubic: every={self.every} must divide the {self.end - self.start} steps."
            )

    def __call__(self, step: Any) -> Any:
        """The sparsity: a float for a whole number, an array for a traced step."""
        if isinstance(step, int):
            step = min(max(step, self.start), self.end)
        else:
            step = jnp.clip(step, self.start, self.end)
        left = 1 - (step - self.start) // self.every * self.every / (self.end - self.start)
        return self.final + (self.initial - self.final) * left**3
