"""How do methods work together? One after another, on one tree."""

import dataclasses
from typing import Any

from quantjax.interpret.method import Method, Run


@dataclasses.dataclass(frozen=True)
class Chain:
    """See `chain`."""

    methods: tuple[Method, ...]

    def __call__(self, run: Run) -> Run:
        first = run.stage
        for i, method in enumerate(self.methods):
            run = method(dataclasses.replace(run, stage=f"{first}/{i}"))
        return dataclasses.replace(run, stage=first)


def chain(*methods: Any) -> Chain:
    """The method that applies these in turn: those that change float parameters without changing
    what the model computes, then those that quantize, then those that correct.

    Raises TypeError for what is no method, such as a policy.
    """
    for method in methods:
        if not isinstance(method, Method):
            raise TypeError(
                f"chain: expected methods such as quantjax.ptq.gptq('w4'), got {method!r}."
            )
    return Chain(methods)
