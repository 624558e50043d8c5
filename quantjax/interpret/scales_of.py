"""Which scales can a value have, if parameters may be scaled? Unknown ones, that operations make
equal, hand on or fix: an interpretation of the program (`abstract`).

A parameter has unknown scales, what reads it in a product tells how many; the model's inputs and
outputs keep theirs, and so does all that goes through an operation without a rule."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from quantjax.interpret import (
    moves,
    scale_elementwise,
    scale_moves,
    scale_products,
    scale_reductions,
)
from quantjax.interpret.abstract import Shape, Step
from quantjax.interpret.program import Leaf
from quantjax.interpret.record import Site
from quantjax.interpret.scale_context import Context, Rule, State, each
from quantjax.interpret.unknowns import Unknowns, ones

_RULES: dict[str, Rule] = {
    **scale_elementwise.RULES,
    **scale_reductions.RULES,
    **scale_moves.RULES,
    **scale_products.RULES,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Scales:
    """The scales of values. shapes, sites: of every parameter, its shape and the products that use
    it, by path."""

    unknowns: Unknowns
    shapes: dict[str, Shape]
    sites: dict[str, list[Site]]

    def leaf(self, leaf: Leaf) -> State:
        """A factor for each set of axes that its uses tell apart; one of all its axes if no product
        uses it."""
        layers = len(leaf.layer)
        shape, sites = self.shapes[leaf.path][layers:], self.sites.get(leaf.path, [])
        rank = len(shape)
        if not sites:
            return (self.unknowns.fresh(shape, gain=True),)
        kinds = [tuple(_use(site, a, layers) for site in sites) for a in range(rank)]
        shared = [a for a in range(rank) if set(kinds[a]) == {"batch"}]
        factors = []
        for found in dict.fromkeys(k for a, k in enumerate(kinds) if a not in shared):
            axes = [a for a in range(rank) if kinds[a] == found] + shared
            products = {k for k, site in zip(found, sites, strict=True) if site.contracting}
            role = "in" if products == {"in"} else "out"
            if role == "in" and any(site.groups > 1 for site in sites):  # inputs of each group
                axes += [a for a in range(rank) if set(kinds[a]) == {"out"}]
            lengths = [n if a in axes else 1 for a, n in enumerate(shape)]
            factors.append(self.unknowns.fresh(lengths, gain=True, role=role))
        return tuple(factors) or (self.unknowns.fresh((1,) * rank, gain=True),)

    def constant(self, value: np.ndarray) -> State:
        """It keeps its scale; zeros and infinities have any."""
        if jnp.issubdtype(value.dtype, jnp.floating):
            wide = value.astype(np.float64)
            if not (np.isfinite(wide) & (wide != 0)).any():
                return None
        return (ones(value.ndim),)

    def plain(self, shape: Shape, reason: str) -> State:
        """It keeps its scale."""
        return (ones(len(shape), self.unknowns.reason(reason) if reason else 0),)

    def taken(self, state: State, i: int) -> State:
        """The scales of entry i of the first axis."""
        return each(state, lambda x: moves.entry(x, 0, i))

    def keep(self, state: State, reason: str) -> None:
        """All its factors keep their scales."""
        for x in state or ():
            self.unknowns.keep(x, reason)

    def outputs(self, step: Step, states: Sequence[State]) -> list[State]:
        """By the rule of the operation; without one, no scale passes."""
        context, rule = Context(step, self.unknowns), _RULES.get(step.name)
        made = None if rule is None else rule(context, states)
        if made is None:
            context.keep(states, f"it goes through {step.name!r}")
            why = step.reason(f"it comes from {step.name!r}")
            made = [self.plain(shape, why) for shape in step.out_shapes]
        return made


def _use(site: Site, axis: int, layers: int) -> str:
    """What a product does with an axis of a layer of its parameter."""
    axis -= site.layers - layers
    if axis < 0 or (axis in site.batch and site.contracting):
        return "batch"
    if axis in site.batch:
        return "row"
    return "in" if axis in site.contracting else "out"
