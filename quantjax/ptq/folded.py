"""Which scale s does an input share among all products that read it, so that the parameters before
it can take 1/s and nothing is left to do at run time?
Lin et al. 2023, arXiv:2306.00978, section 4.2; Xiao et al. 2022, arXiv:2211.10438, section 4 (both
fold into the norm or the linear layer before)."""

import dataclasses
import warnings
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from quantjax.affine import find_scales
from quantjax.interpret.method import Journal, Run
from quantjax.interpret.scaling import Factor, ScaleGroup, find_scaling, scaled
from quantjax.paths import named_leaves
from quantjax.ptq.layerwise import Layerwise, Problem, plan
from quantjax.ptq.moments import Moments
from quantjax.qtensor import QTensor
from quantjax.spec import QuantSpec


@runtime_checkable
class ChannelSolver(Protocol):
    """A solver that scales input channels, and how it chooses s for the channels of a group."""

    widest: bool

    def of_weights(self, w: Float[Array, "*w"], spec: QuantSpec) -> Float[Array, "*w"]:
        """What of the weights enters s."""

    def of_inputs(self, moments: Moments) -> Float[Array, "b i"]:
        """What of the inputs enters s."""

    def tried(self, m_C: Float[Array, " c"], w_C: Float[Array, " c"]) -> Float[Array, "n c"]:
        """The scales of channels among which the best is to be found."""

    def errors(self, problem: Problem, s_N: Float[Array, "n *#w"]) -> Float[Array, " n"]:
        """The output error of a parameter under each of these scales, in the axes of the leaf."""


class _Use(NamedTuple):
    """One parameter, or layer of one, that multiplies the channels of a group."""

    group: int
    factor: Factor


@dataclasses.dataclass(frozen=True, eq=False)
class _Measure:
    """The solver that quantizes nothing, and adds up the errors of every group's candidates."""

    solver: ChannelSolver
    groups: tuple[ScaleGroup, ...]
    uses: dict[str, list[_Use]]
    weights: list[np.ndarray]
    errors: dict[int, np.ndarray]
    logs: dict[int, list[np.ndarray]]
    paired: bool = False

    def __call__(self, problem: Problem) -> QTensor:
        w, form = problem.w, problem.form
        for use in self.uses.get(problem.name, ()):
            channels, index = self.groups[use.group].channels, use.factor.index
            inputs = self.solver.of_inputs(problem.moments)[:, None]
            each = form.leaf(jnp.broadcast_to(inputs, form.sizes(w.shape)), w.shape)
            m_C = _of_channels([(np.asarray(each), index)], channels, self.solver.widest)
            weights_C = jnp.asarray(self.weights[use.group])
            s_NC = np.asarray(self.solver.tried(jnp.asarray(m_C), weights_C))
            # Powers other than 1 come of roots and squares on the way to this product.
            s_N = np.where(index < 0, np.float32(1), s_NC[:, index] ** use.factor.power)
            lost_N = np.asarray(self.solver.errors(problem, jnp.asarray(s_N, jnp.float32)))
            so_far = self.errors.setdefault(use.group, np.zeros(len(lost_N)))
            so_far += lost_N
            self.logs.setdefault(use.group, []).append(np.log(np.float64(s_NC)))
        return problem.stored(problem.w_BOI, find_scales(w, problem.spec))


def _of_channels(
    parts: list[tuple[np.ndarray, np.ndarray]], channels: int, widest: bool
) -> np.ndarray:
    """The mean, or the largest, of the values at each channel's positions."""
    total, count = np.zeros(channels), np.zeros(channels)
    for values, index in parts:
        at = np.broadcast_to(index, values.shape)
        inside = at >= 0
        if widest:
            np.maximum.at(total, at[inside], values[inside])
        else:
            total += np.bincount(at[inside], values[inside], channels)
            count += np.bincount(at[inside], minlength=channels)
    return (total if widest else total / np.maximum(count, 1)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Folded:
    """The method that scales channels before it quantizes, where the parameters before can take
    the inverse, and then runs `method`, whose solver scales the rest on the leaf.

    All products of one input share s: the candidate with the least sum of their output errors in
    the float model. Raises ValueError as `method` does.
    """

    method: Layerwise

    def __call__(self, run: Run) -> Run:
        run.floats_only(type(self.method.solver).__name__)
        scaling = find_scaling(run.apply, run.tree, *run.batches[0])
        found = run.done("scales")
        if found is None:
            found = run.note("scales", self._search(run, scaling.groups))
        chosen = {int(g): jnp.asarray(s) for g, s in found.items()}
        moved = [(scaling.groups[g], s) for g, s in sorted(chosen.items())]
        trees = {"tree": scaled(run.tree, moved), "reference": scaled(run.reference, moved)}
        names = frozenset(
            factor.leaf.name
            for group, _ in moved
            for factor in group.consumers
            if not scaling.reason(factor.leaf.path, factor.leaf.layer)
        )
        method = dataclasses.replace(self.method, solver=_fixed(self.method.solver, names))
        return method(dataclasses.replace(run, **trees))

    def _search(self, run: Run, groups: tuple[ScaleGroup, ...]) -> dict[str, Any]:
        """The best s of every group that the policy quantizes some consumer of, by its number."""
        solver = _scaler(self.method.solver)
        resolved, forms = plan(run, self.method.policy)
        leaves = dict(named_leaves(run.tree)[0])
        uses: dict[str, list[_Use]] = {}
        weights: list[np.ndarray] = []
        for g, group in enumerate(groups):
            parts = []
            for factor in group.consumers:
                path, layer = factor.leaf.path, factor.leaf.layer
                if path not in forms:
                    continue
                spec = resolved[path].spec
                assert spec is not None
                uses.setdefault(factor.leaf.name, []).append(_Use(g, factor))
                x = jnp.asarray(leaves[path], jnp.float32)
                parts.append((np.asarray(solver.of_weights(x, spec)[layer]), factor.index))
            weights.append(_of_channels(parts, group.channels, solver.widest))
        measure = _Measure(solver, groups, uses, weights, {}, {})
        if uses:
            method = dataclasses.replace(self.method, solver=measure, sequential=False)
            with warnings.catch_warnings():  # they come again when parameters are quantized
                warnings.simplefilter("ignore")
                method(dataclasses.replace(run, journal=Journal()))
        return {
            str(g): np.float32(np.exp(np.mean([x[np.argmin(lost)] for x in measure.logs[g]], 0)))
            for g, lost in measure.errors.items()
        }


def _scaler(solver: Any) -> ChannelSolver:
    """The solver that scales, which another may correct."""
    return solver if isinstance(solver, ChannelSolver) else _scaler(solver.solver)


def _fixed(solver: Any, names: frozenset[str]) -> Any:
    """The solver that takes the inputs of these parameters as they are."""
    if isinstance(solver, ChannelSolver):
        return dataclasses.replace(solver, fixed=names)  # type: ignore[type-var]
    return dataclasses.replace(solver, solver=_fixed(solver.solver, names))
