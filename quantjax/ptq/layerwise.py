"""How is a network quantized parameter by parameter, each on the inputs that it will really see?

From front to back: the inputs of a parameter are gathered with all before it quantized already, it
is settled, and the batches go on through it (sequential GPTQ, Frantar et al. 2023,
arXiv:2210.17323, section 4). One pass in all; the moments of one parameter at a time."""

import dataclasses
import warnings
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from quantjax import affine
from quantjax.affine import Scales
from quantjax.interpret.intercept import sites
from quantjax.interpret.method import Run
from quantjax.interpret.pieces import Leaves, Pieces
from quantjax.interpret.program import Leaf, layer_of
from quantjax.interpret.statistics import State
from quantjax.paths import named_leaves
from quantjax.policy import Policy, Resolution, Resolved, preset
from quantjax.ptq.matrix import Cells, MatrixForm, matrix_form
from quantjax.ptq.moments import Moments
from quantjax.ptq.observe import observed, start
from quantjax.qtensor import QTensor
from quantjax.rounding import Rounding
from quantjax.spec import QuantSpec
from quantjax.transform import dequantize, quantize


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """One parameter, or one layer of it, to be quantized.

    name: its key path, for errors and warnings. w: the float array. form: how it is a stack of
    matrices w_BOI. spec: how it is quantized, with an explicit block. moments: of its inputs.
    """

    name: str
    w: Float[Array, "*w"]
    form: MatrixForm
    spec: QuantSpec
    moments: Moments

    @property
    def w_BOI(self) -> Float[Array, "b o i"]:
        """The matrices, in float32."""
        return self.form.matrices(self.w.astype(jnp.float32))

    def cells(self, scales: Scales) -> Cells:
        """The grid under every weight, for these scales."""
        return self.form.cells(scales, self.spec, self.w.shape)

    def stored(self, w_BOI: Float[Array, "b o i"], scales: Scales) -> QTensor:
        """The quantized parameter with these values, which lie on the grid of the scales."""
        x = self.form.leaf(w_BOI, self.w.shape)
        return dataclasses.replace(_stored(x, scales, spec=self.spec), dtype=np.dtype(self.w.dtype))


_stored = jax.jit(affine.quantize_array, static_argnames="spec")


@runtime_checkable
class Solver(Protocol):
    """A frozen, hashable value that settles one parameter. paired: whether it uses E[f x'], the
    moments between what the float model and the quantized one have there."""

    @property
    def paired(self) -> bool:
        """See above."""

    def __call__(self, problem: Problem, /) -> QTensor:
        """The parameter, quantized as its spec says."""


@dataclasses.dataclass(frozen=True)
class Layerwise:
    """The method that quantizes under `policy`, each parameter of a product by `solver`.

    sequential: the inputs are those that the quantized layers before it give; else those of the
    float model. Parameters that no product sums over (tables that are only looked up) and those
    whose products are of a kind that is not known are rounded to nearest, the latter with a
    warning. Warns as well where no sample comes to an expert. A parameter that is used in several
    places takes the moments of all, in the float model, and is settled at the first.
    rows: how many inputs a parameter looks at for each weight of one output, over all batches. A
    convolution has far more, as its windows overlap; their moments cost more than the model. None
    for all.
    Raises ValueError, naming the parameter, for NaN or infinity in it and, with the batch, in what
    meets it.
    """

    policy: Policy | Resolved | str
    solver: Solver
    sequential: bool = True
    rows: int | None = 128

    def __call__(self, run: Run) -> Run:
        run.floats_only(type(self.solver).__name__)
        resolved, forms = plan(run, self.policy)
        for name, leaf in named_leaves(run.tree)[0]:
            if name in forms and not jnp.isfinite(leaf).all():
                raise ValueError(f"{name}: holds NaN or infinity; nothing can be fitted to that.")
        tree = rounded(run.tree, resolved, without=forms)
        settled = _settle(self, run, resolved, forms, dict(named_leaves(tree)[0]))
        for path in forms.keys() - settled.keys():
            warnings.warn(
                f"{path}: no product that is known uses it; rounded to nearest.", stacklevel=2
            )
        tree = rounded(run.tree, resolved, without=settled)
        named, structure = named_leaves(tree)
        leaves = [settled.get(name, leaf) for name, leaf in named]
        return dataclasses.replace(run, tree=jax.tree.unflatten(structure, leaves))


def plan(run: Run, policy: Policy | Resolved | str) -> tuple[Resolved, dict[str, MatrixForm]]:
    """The decision for every leaf, and the form of those that a product sums over."""
    found = sites(run.apply, run.tree, *run.batches[0])
    if isinstance(policy, Resolved):
        resolved = policy.resolve(run.tree)
    else:
        policy = preset(policy) if isinstance(policy, str) else policy
        resolved = policy.resolve(run.tree, found)
    forms: dict[str, MatrixForm] = {}
    for path, decision in resolved.leaves:
        spec = decision.spec
        if spec is None:
            continue
        if spec.rounding is not Rounding.NEAREST:
            raise ValueError(f"{path}: {spec.rounding} rounding; this method rounds by itself.")
        asked = [matrix_form(site) for site in found if site.path == path]
        own = {form for form in asked if form is not None}
        if len(own) == 1:
            forms[path] = own.pop()
        elif own:
            warnings.warn(
                f"{path}: its products sum over different axes; rounded to nearest.", stacklevel=2
            )
    return resolved, forms


def rounded(tree: Any, resolved: Resolved, without: Container[str]) -> Any:
    """The tree rounded to nearest as it is to be quantized, but for some paths."""
    decisions = [
        (path, dataclasses.replace(d, spec=None) if path in without else d)
        for path, d in resolved.leaves
    ]
    return quantize(tree, Resolved(tuple(decisions)))


@dataclasses.dataclass(frozen=True, eq=False)
class _Task:
    """A parameter, or the layer of it that a scan takes off, before its inputs are known. layers:
    leading axes whose inputs are told apart by the products themselves."""

    name: str
    w: Any
    form: MatrixForm
    spec: QuantSpec

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.w.shape[: self.spec.stacked])

    @property
    def inputs(self) -> int:
        return self.form.sizes(self.w.shape)[2]

    def start(self, *, cross: bool) -> State:
        return start(self.form.sizes(self.w.shape), self.layers, cross=cross)

    def problem(self, state: State) -> Problem:
        """With the moments of its inputs, the layers' in one row."""
        joined = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), state)
        return Problem(self.name, self.w, self.form, self.spec, Moments(**joined))


def _task(
    x: Leaf, forms: Mapping[str, MatrixForm], resolved: Resolved, now: Mapping[str, Any]
) -> _Task:
    spec, taken = resolved[x.path].spec, len(x.layer)
    assert spec is not None
    spec = dataclasses.replace(spec, stacked=spec.stacked - taken)
    return _Task(x.name, layer_of(now[x.path], x.layer), forms[x.path].inner(taken), spec)


def _settle(
    method: Layerwise,
    run: Run,
    resolved: Resolved,
    forms: Mapping[str, MatrixForm],
    now: Mapping[str, Any],
) -> dict[str, QTensor]:
    """The quantized parameters by path, one after another."""
    floats = dict(named_leaves(run.reference)[0])
    pieces = Pieces(run.apply, run.tree, run.batches, lambda x: x if x.path in forms else None)
    order = [sorted(pieces.segment(k).labels) for k in range(len(pieces))]
    done: dict[Leaf, QTensor] = {}

    def in_float(x: Leaf) -> Any:
        return layer_of(floats[x.path], x.layer)

    def as_now(x: Leaf) -> Any:
        return running(done[x]) if x in done else layer_of(now[x.path], x.layer)

    leaves = (as_now, in_float)
    tasks = {x: _task(x, forms, resolved, now) for labels in order for x in labels}
    paired = method.sequential and method.solver.paired
    batches = pieces.batches

    def most(x: Leaf) -> int | None:
        return method.rows and -(-method.rows * tasks[x].inputs // batches)

    seen = _seen_apart(pieces, order, tasks, in_float, most)
    stream = float_stream = pieces.start()
    for k, labels in enumerate(order):
        for x in labels:
            if x not in done and (q := run.done(x.name)) is not None:
                done[x] = q
            elif x not in done:
                state = seen.pop(x, None)
                if state is None:
                    alone = paired and not tasks[x].layers and pieces.segment(k).is_plain(x)
                    state = tasks[x].start(cross=alone)
                    state = observed(
                        pieces, k, x, state, tasks[x].layers, most(x), leaves, stream,
                        float_stream if alone else None,
                    )  # fmt: skip
                done[x] = run.note(x.name, _solved(method.solver, tasks[x].problem(state)))
        if method.sequential:
            stream = pieces.advance(k, stream, as_now)
            if paired:
                float_stream = pieces.advance(k, float_stream, in_float)
        else:
            stream = pieces.advance(k, stream, in_float)
    found: dict[str, dict[tuple[int, ...], QTensor]] = {}
    for x, q in done.items():
        found.setdefault(x.path, {})[x.layer] = q
    for path, parts in found.items():
        if () in parts and len(parts) > 1:
            raise ValueError(f"{path}: used as a whole and layer by layer; keep it in float.")
    return {path: of_layers(parts) for path, parts in found.items()}


def _seen_apart(
    pieces: Pieces,
    order: Sequence[Sequence[Leaf]],
    tasks: Mapping[Leaf, _Task],
    in_float: Leaves,
    most: Callable[[Leaf], int | None],
) -> dict[Leaf, State]:
    """The moments of parameters that are used in several pieces, all in the float model."""
    counts = Counter(x for labels in order for x in labels)
    found = {x: tasks[x].start(cross=False) for x, n in counts.items() if n > 1}
    stream = pieces.start()
    for k, labels in enumerate(order) if found else ():
        for x in labels:
            if x in found:
                own = (found[x], tasks[x].layers, most(x), (in_float, in_float), stream, None)
                found[x] = observed(pieces, k, x, *own)
        stream = pieces.advance(k, stream, in_float)
    return found


def _solved(solver: Solver, problem: Problem) -> QTensor:
    """What the solver makes of it; rounded to nearest, with a warning, where nothing was seen."""
    unseen = np.flatnonzero(jax.device_get(problem.moments.rows) == 0)
    if len(unseen):
        shown = ", ".join(map(str, unseen[:5])) + (", ..." if len(unseen) > 5 else "")
        which = "" if len(problem.moments.rows) == 1 else f" (matrix {shown})"
        warnings.warn(
            f"{problem.name}{which}: no sample came to its product, or it is of a kind whose "
            f"inputs are not known; rounded to nearest.",
            stacklevel=2,
        )
    if len(unseen) == len(problem.moments.rows):
        return quantize({"w": problem.w}, Resolved((("w", Resolution(problem.spec, "")),)))["w"]
    return solver(problem)


def running(leaf: Any) -> Any:
    """A leaf as the batches go on through it: a static scale of its activation that is not found
    yet is found anew in each batch. Weights alone go on as floats, so that one program of a piece
    serves every format."""
    if not isinstance(leaf, QTensor):
        return leaf
    act = leaf.act
    if act is None:
        return dequantize(leaf)
    if not act.static or leaf.act_scale is not None:
        return leaf
    return dataclasses.replace(leaf, act=dataclasses.replace(act, static=False))


def of_layers(found: Mapping[tuple[int, ...], QTensor]) -> QTensor:
    """One parameter of its layers, or itself."""
    if () in found:
        return found[()]
    firsts = sorted({layer[0] for layer in found})
    parts = [of_layers({k[1:]: q for k, q in found.items() if k[0] == i}) for i in firsts]
    return jax.tree.map(lambda *a: jnp.stack(a), *_alike(parts))


def _alike(parts: Sequence[QTensor]) -> list[QTensor]:
    """The layers of one parameter with the same children: an input scale of ones, and factors of
    zeros, for those that were rounded to nearest or need none."""

    def filled(name: str, value: float) -> dict[str, Any]:
        have = [getattr(q, name) for q in parts if getattr(q, name) is not None]
        return {name: jnp.full_like(have[0], value)} if have else {}

    extra = filled("input_scale", 1) | filled("left", 0) | filled("right", 0)
    return [
        dataclasses.replace(q, **{k: v for k, v in extra.items() if getattr(q, k) is None})
        for q in parts
    ]
