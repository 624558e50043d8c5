"""How is a network quantized block by block, so that each block gives what it gave in floats?

Li et al., "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction", 2021,
arXiv:2102.05426; with activations Wei et al., "QDrop", 2022, arXiv:2203.05740. Within a block the
weights are rounded together, as what one loses another can make good; between blocks each sees what
those before it lost. A block of one layer is AdaRound through what follows it, arXiv:2004.10568,
equation 25."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quantjax import affine
from quantjax.affine import Scales, find_scales
from quantjax.interpret.evaluate import Machine
from quantjax.interpret.method import Run
from quantjax.interpret.pieces import Leaves, Pieces, Stream
from quantjax.interpret.program import Leaf, layer_of
from quantjax.interpret.record import Record
from quantjax.interpret.segments import Label, Segment
from quantjax.interpret.statistics import State, Statistics, Watch
from quantjax.paths import compile_pattern, named_leaves, nearest
from quantjax.policy import Policy, Resolved
from quantjax.ptq.fisher import Loss, output_weights
from quantjax.ptq.layerwise import of_layers, plan, rounded
from quantjax.ptq.soft_block import (
    Given,
    How,
    Learned,
    Place,
    Sample,
    compared,
    found,
    judged,
    scaled,
    settled,
    step,
)
from quantjax.ptq.soft_rounding import Anneal, adam_start, hardened, start_at
from quantjax.qtensor import QTensor
from quantjax.spec import Granularity, QuantSpec


@dataclasses.dataclass(frozen=True)
class Reconstruct:
    """The method behind `brecq` and `qdrop`."""

    policy: Policy | Resolved | str
    blocks: tuple[str, ...] = ()
    anneal: Anneal = Anneal(500)
    rows: int | None = 32
    loss: Loss | None = None
    drop: float = 0.0
    static: bool = False
    seed: int = 0

    def __call__(self, run: Run) -> Run:
        run.floats_only("reconstruction")
        resolved, forms = plan(run, self.policy)
        label = _label(self.blocks, [name for name, _ in named_leaves(run.tree)[0]], set(forms))
        pieces = Pieces(run.apply, run.tree, _cut(run.batches, self.rows), label)
        tree = dict(named_leaves(rounded(run.tree, resolved, without=forms))[0])
        floats = dict(named_leaves(run.reference)[0])

        def spec_of(x: Leaf) -> QuantSpec:
            spec = resolved[x.path].spec
            assert spec is not None
            act = spec.act
            if act is not None and self.static:
                act = dataclasses.replace(act, block=Granularity.TENSOR, static=True)
            return dataclasses.replace(spec, stacked=spec.stacked - len(x.layer), act=act)

        def in_float(x: Leaf) -> Any:
            return layer_of(floats[x.path], x.layer)

        def as_now(x: Leaf) -> Any:
            return settled(done[x]) if x in done else layer_of(tree[x.path], x.layer)

        done: dict[Leaf, QTensor] = {}
        weights: list[list[Any]] = [[None] * len(s.outputs) for s in pieces.segments()]
        if self.loss is not None:
            weights = output_weights(pieces, in_float, self.loss)
        stream = float_stream = pieces.start()
        for k, segment in enumerate(pieces.segments()):
            own = [x for x in segment.leaves if x.path in forms and x not in done]
            if own:
                name = own[0].name
                kept = run.done(name)
                if kept is None:
                    places = tuple(
                        Place(
                            segment.leaves.index(x), forms[x.path].inner(len(x.layer)), spec_of(x)
                        )
                        for x in own
                    )
                    at = _Block(pieces, k, name, as_now, places)
                    samples = at.samples(stream, float_stream, weights[k], in_float)
                    quantized = at.learn(self, samples)
                    kept = {x.name: q for x, q in zip(own, quantized, strict=True)}
                    kept = run.note(name, kept)
                done.update({x: kept[x.name] for x in own})
            float_stream = pieces.advance(k, float_stream, in_float)
            stream = pieces.advance(k, stream, as_now)
        parts: dict[str, dict[tuple[int, ...], QTensor]] = {}
        for x, q in done.items():
            parts.setdefault(x.path, {})[x.layer] = q
        whole = {path: of_layers(layers) for path, layers in parts.items()}
        named, structure = named_leaves(rounded(run.tree, resolved, without=whole))
        leaves = [whole.get(name, leaf) for name, leaf in named]
        return dataclasses.replace(run, tree=jax.tree.unflatten(structure, leaves))


@dataclasses.dataclass(frozen=True, eq=False)
class _Block:
    """One piece of the network, while it learns. leaves: the parameters as they are now."""

    pieces: Pieces
    k: int
    name: str
    leaves: Leaves
    places: tuple[Place, ...]

    def samples(
        self, stream: Stream, float_stream: Stream, weights: list[Any], in_float: Leaves
    ) -> list[Sample]:
        """What every batch is here."""
        made = []
        for batch in range(self.pieces.batches):
            segment = self.pieces.segment(self.k, batch)
            inputs, floats = (
                [values[batch][id] for id in segment.inputs] for values in (stream, float_stream)
            )
            targets = self.pieces.call("found", self.k, batch, found, in_float, float_stream)
            ends = zip(weights, segment.outputs, compared(segment), strict=True)
            own = [w if output == id else None for w, output, id in ends]
            made.append(Sample(inputs, floats, targets, own))
        return made

    def learn(self, method: Reconstruct, samples: list[Sample]) -> list[QTensor]:
        """The quantized parameters of the block, in the order of its places."""
        segment = self.pieces.segment(self.k)
        held = [self.leaves(x) for x in segment.leaves]
        w = [held[p.leaf] for p in self.places]
        scales = [_found(x, spec=p.spec) for x, p in zip(w, self.places, strict=True)]
        given = self._given(held, w, scales, samples)
        how = How(self.places, method.anneal, method.drop)
        v = [start_at(x.astype(jnp.float32), b) for x, b in zip(w, given.between, strict=True)]
        learned = Learned(v, [None if s is None else jnp.zeros_like(s) for s in given.act_scale])

        nearest = [hardened(v, b) for v, b in zip(learned.v, given.between, strict=True)]
        before = self._errors(how, held, nearest, given.act_scale, given, samples)
        for batch, error in enumerate(before):
            if not np.isfinite(error):
                raise ValueError(
                    f"{self.name}: batch {batch}: what its block gives holds NaN or infinity; "
                    f"nothing can be fitted to that."
                )
        size = sum(x.size for x in w)
        unit = jnp.float32(size / before.mean() if before.mean() > 0 else 0)
        moving, key = adam_start(learned), jax.random.key(method.seed)
        order = np.random.default_rng(method.seed)
        rounds = -(-method.anneal.steps // len(samples))
        turns = [int(n) for _ in range(rounds) for n in order.permutation(len(samples))]
        for i, batch in enumerate(turns[: method.anneal.steps]):
            learned, moving = self._call(
                step, how, batch, held, learned, moving, given, samples[batch], unit,
                jnp.int32(i), key,
            )  # fmt: skip
        values = [hardened(v, b) for v, b in zip(learned.v, given.between, strict=True)]
        act_scales = scaled(learned, given)
        if not self._errors(how, held, values, act_scales, given, samples).mean() < before.mean():
            values, act_scales = nearest, given.act_scale
        return [
            self._stored(*each, given.act_zero_point[i])
            for i, each in enumerate(zip(self.places, w, values, scales, act_scales, strict=True))
        ]

    def _stored(
        self, place: Place, w: Any, value: Any, scales: Scales, act_scale: Any, act_zero: Any
    ) -> QTensor:
        q = _quantized(value, scales, spec=place.spec)
        act = place.spec.act
        if act_zero is not None and act is not None and hasattr(act.format, "code_dtype"):
            act_zero = act_zero.astype(act.format.code_dtype)
        own = {"act_scale": act_scale, "act_zero_point": act_zero}
        return dataclasses.replace(q, dtype=np.dtype(w.dtype), **own)

    def _call(self, function: Callable, how: How, batch: int, held: list[Any], *extra: Any) -> Any:
        """function(how, segment, held, constants, *extra), compiled once for equal segments."""
        segment = self.pieces.segment(self.k, batch)
        leaves = dict(zip(segment.leaves, held, strict=True))

        def run(segment: Segment, held: Any, constants: Any, *extra: Any) -> Any:
            return function(how, segment, held, constants, *extra)

        kind = (function.__name__, how)
        return self.pieces.call(kind, self.k, batch, run, leaves.__getitem__, extra=extra)

    def _errors(
        self, how: How, held: list[Any], values: Any, act_scales: Any, given: Given,
        samples: list[Sample],
    ) -> np.ndarray:  # fmt: skip
        """The error on every batch."""
        errors = [
            self._call(judged, how, batch, held, values, act_scales, given, sample)
            for batch, sample in enumerate(samples)
        ]
        return np.asarray(jax.device_get(errors), np.float64)

    def _given(
        self, held: list[Any], w: list[Any], scales: list[Scales], samples: list[Sample]
    ) -> Given:
        """The neighbours of all weights, and the static scales that activations begin with: those
        of their range in the quantized network, with the weights of the block in float."""
        between = [
            _between(x.astype(jnp.float32), s, place=p)
            for x, s, p in zip(w, scales, self.places, strict=True)
        ]
        act_scale: list[Any] = []
        act_zero: list[Any] = []
        for place, x in zip(self.places, w, strict=True):
            act = place.spec.act
            start = Scales(None)
            if act is not None and act.static:
                watch = Watch(act, x.shape[: place.spec.stacked])
                start = watch.scales(self._range(watch, place.leaf, held, samples))
            zero = start.zero_point
            act_scale.append(start.scale)
            act_zero.append(None if zero is None else zero.astype(jnp.float32))
        return Given(between, act_scale, act_zero)

    def _range(self, watch: Watch, at: int, held: list[Any], samples: list[Sample]) -> State:
        """What the observer saw of the activation that meets a leaf."""
        state = watch.empty()
        segment = self.pieces.segment(self.k)
        leaves = dict(zip(segment.leaves, held, strict=True))

        def see(segment: Segment, held: Any, constants: Any, inputs: Any, state: State) -> State:
            name = segment.leaves[at].name
            statistics = Statistics({name: watch}, {name: state})
            segment.run(Machine(Record(), statistics=statistics), held, constants, inputs)
            return statistics.state[name]

        for batch, sample in enumerate(samples):
            kind, extra = ("range", watch, at), [sample.inputs, state]
            state = self.pieces.call(kind, self.k, batch, see, leaves.__getitem__, extra=extra)
        return state


_found = jax.jit(find_scales, static_argnames="spec")
_quantized = jax.jit(affine.quantize_array, static_argnames="spec")
_between = jax.jit(lambda w, scales, place: place.between(w, scales), static_argnames="place")


def _label(
    blocks: Sequence[str], names: Sequence[str], quantized: set[str]
) -> Callable[[Leaf], Label | None]:
    """The block of a parameter: the first part of its path that a pattern matches, or itself if it
    is to be quantized. Layers that a scan takes off are blocks of their own, unless all is one."""
    patterns = [(pattern, compile_pattern(pattern)) for pattern in blocks]
    for pattern, regex in patterns:
        if not any(_block(name, regex) for name in names):
            raise ValueError(
                f"blocks: pattern {pattern!r} matches no parameter. Nearest: "
                f"{nearest(pattern, names)}."
            )

    def label(x: Leaf) -> Label | None:
        for pattern, regex in patterns:
            block = _block(x.path, regex)
            if block is not None:
                return ("**",) if pattern == "**" else (block, x.layer)
        return (x.path, x.layer) if x.path in quantized else None

    return label


def _block(path: str, regex: Any) -> str | None:
    """The shortest beginning of a path that matches."""
    parts = path.split("/")
    starts = ("/".join(parts[:n]) for n in range(1, len(parts) + 1))
    return next((start for start in starts if regex.fullmatch(start)), None)


def _cut(batches: Sequence[tuple[Any, ...]], rows: int | None) -> list[tuple[Any, ...]]:
    """Batches of so many rows, cut along the first axis of all their arrays; whole where that is
    not one length which the number divides."""
    cut: list[tuple[Any, ...]] = []
    for batch in batches:
        leaves, structure = jax.tree.flatten(batch)
        lengths = {np.shape(x)[0] if np.ndim(x) else 0 for x in leaves if hasattr(x, "shape")}
        n = lengths.pop() if len(lengths) == 1 else 0
        if rows is None or n <= rows or n % rows:
            cut.append(batch)
            continue
        for start in range(0, n, rows):
            own = [x[start : start + rows] if hasattr(x, "shape") else x for x in leaves]
            cut.append(jax.tree.unflatten(structure, own))
    return cut


def brecq(
    policy: Policy | Resolved | str,
    *,
    blocks: Sequence[str] = (),
    steps: int = 500,
    rows: int | None = 32,
    loss: Loss | None = None,
    seed: int = 0,
) -> Reconstruct:
    """The method that rounds all weights of a block together, so that its outputs are kept.

    min_V E sum w (z - z_q)^2 + lambda sum 1 - |2 h(V) - 1|^beta for each block in turn, z its
    outputs in the float network, z_q with the quantized blocks before it and its own weights
    between two levels, low + h(V) (high - low); beta falls from 20 to 2, and V follows Adam for
    `steps` steps of one batch each. Where that is worse than rounding to nearest, the latter stays.

    blocks: patterns of the beginnings of parameter paths ("layer*_*", "decoder/*"); what begins
    alike is one block, and each layer that a scan takes off; "**" is the whole network. Of a
    parameter that none matches, the block is its layer with what follows up to the next one.
    rows: batches are cut along their first axis into ones of so many, if that divides them. loss:
    L(logits, key) makes w = E[(dL / dz)^2], the diagonal of the Fisher matrix if it is
    `own_labels`; None is w = 1, which did better on networks that know their samples by heart.
    Static activation scales are learned with the weights (LSQ, arXiv:1902.08153), from where the
    observer puts them. State is saved after each block.

    Raises ValueError for a pattern that matches no parameter and, naming a parameter and a batch,
    for NaN or infinity in what a block gives. Source: Li et al. 2021, arXiv:2102.05426.

    >>> import quantjax as qj
    >>> params = {"a": jnp.array([[0.3, -0.8], [0.7, 0.2]]), "b": jnp.array([[0.4], [-0.5]])}
    >>> apply = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    >>> x = jax.random.normal(jax.random.key(0), (32, 2))
    >>> qj.calibrate(apply, params, [x], brecq("w3", blocks=("**",), steps=20))["a"]
    QTensor(int3, shape=(2, 2), block=allx1, dtype=float32)
    """
    return Reconstruct(policy, tuple(blocks), Anneal(steps), rows, loss, 0.0, False, seed)


def qdrop(
    policy: Policy | Resolved | str,
    *,
    blocks: Sequence[str] = (),
    steps: int = 500,
    rows: int | None = 32,
    loss: Loss | None = None,
    drop: float = 0.5,
    seed: int = 0,
) -> Reconstruct:
    """`brecq` for activations of few bits: each element stays float with probability `drop`.

    In each step that goes for every element of an activation that a product would round, and for
    the inputs of the block, which are then those of the float network; so the weights are found for
    a flatter loss. All activations that the policy quantizes get one static scale, which is learned
    with the weights of its block; at the end all are rounded.

    Raises as `brecq` does. Source: Wei et al. 2022, arXiv:2203.05740.
    """
    if not 0 <= drop < 1:
        raise ValueError(f"qdrop: drop is a probability below 1, got {drop}.")
    return Reconstruct(policy, tuple(blocks), Anneal(steps), rows, loss, drop, True, seed)
