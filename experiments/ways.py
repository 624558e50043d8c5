"""Which estimators are compared, for which formats, and what of a network do they train?"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

import quantjax as qj
from experiments.rows import NotApplicable
from quantjax import formats, qat
from quantjax.fake_quantized import FakeQuantized, is_quantized
from quantjax.policy import preset_spec
from quantjax.spec import Granularity

FEW = ("w4", "w3", "w2", "ternary", "w1")


class Way(NamedTuple):
    """estimator: None is straight-through, with scales searched anew as weights move. weights: the
    formats it is defined for. acts: whether its own rule for activations is what it is about.
    offset: whether activations have a zero point. project: after each step. spec: of weights, in
    place of the preset's. grid: of activations of so many bits, in place of integers; most: of
    these bits at most."""

    estimator: qat.Estimator | None
    weights: tuple[str, ...] = FEW
    acts: bool = False
    offset: bool = False
    project: Callable[[Any], Any] | None = None
    spec: Callable[[str], qj.QuantSpec] = preset_spec
    grid: Callable[[int], Any] = functools.partial(qj.IntFormat, signed=False)
    most: int = 8


def trained_ternary(weights: str) -> qj.QuantSpec:
    """Three levels that are learned."""
    return qj.QuantSpec(format=qj.Codebook.learned(2), block=Granularity.TENSOR)


def powers_of_two(weights: str) -> qj.QuantSpec:
    """Sums of powers of two, one bound a layer, as in the paper."""
    return qj.QuantSpec(format=formats.apot(int(weights[1:])), block=Granularity.TENSOR)


def half_integers(weights: str) -> qj.QuantSpec:
    """The preset's bits, on as many levels above zero as below."""
    grid = qj.IntFormat(int(weights[1:]), levels=qj.Levels.HALF)
    return dataclasses.replace(preset_spec(weights), format=grid)


def of_weights(estimator: qat.Estimator, *weights: str, **how: Any) -> Way:
    """An estimator of weights, with LSQ's activations."""
    return Way(qat.Estimator(estimator.weights, qat.lsq().activations), weights or FEW, **how)


WAYS: dict[str, Way] = {
    "straight-through": Way(None),
    "lsq": Way(qat.lsq()),
    "lsq_plus": Way(qat.lsq_plus(), acts=True, offset=True),
    "dorefa": Way(qat.dorefa(), ("w4", "w3", "w2", "w1")),
    "pact": Way(qat.pact(), ("w4", "w3", "w2", "w1"), acts=True),
    "paretoq": of_weights(qat.paretoq()),
    "apot": Way(
        qat.apot(),
        ("w4", "w3", "w2"),
        spec=powers_of_two,
        grid=functools.partial(formats.apot, signed=False),
    ),
    "n2uq": Way(qat.n2uq(), ("w4", "w3", "w2"), acts=True, spec=half_integers, most=4),
    "twn": of_weights(qat.twn(), "ternary"),
    "ttq": of_weights(qat.ttq(), "ternary", spec=trained_ternary),
    "bitnet": of_weights(qat.bitnet(), "ternary"),
    "binary_connect": of_weights(qat.binary_connect(), "w1", project=qat.clip_values),
    "xnor": of_weights(qat.xnor(), "w1"),
    "ir_net": of_weights(qat.ir_net(), "w1"),
}


class Layers(NamedTuple):
    """Patterns of the kernels of the first layer, of those between, and of the last."""

    first: str
    between: tuple[str, ...]
    last: str


class Part(NamedTuple):
    """Layers that one estimator trains; None is straight-through."""

    policy: qj.Policy
    estimator: qat.Estimator | None


def activation(
    bits: int,
    *,
    signed: bool = False,
    offset: bool = False,
    levels: qj.Levels = qj.Levels.NARROW,
) -> qj.QuantSpec | None:
    """One static scale for a layer. Rectified inputs are unsigned. levels: of signed ones."""
    if bits == 32:
        return None
    grid = qj.IntFormat(bits, signed=signed, levels=levels)
    spec = qj.QuantSpec(format=grid, block=Granularity.TENSOR, static=True, observer=qj.mse())
    return dataclasses.replace(spec, symmetric=not offset)


def parts(layers: Layers, way: Way, weights: str, bits: int, *, low: bool = False) -> list[Part]:
    """The layers between, and the outer ones in 8 bits by LSQ; with `low` all of them in few bits,
    but the image, which keeps 8. bits: of activations, 32 for float. Raises NotApplicable."""
    if weights not in way.weights:
        raise NotApplicable("is not defined for these weights")
    if way.acts and bits == 32:
        raise NotApplicable("is about activations; of weights alone it is another one's")
    if way.most < bits < 32:
        raise NotApplicable(f"learns a threshold for every code, of {way.most} bits at most")
    act = activation(bits, offset=way.offset)
    if act is not None:
        act = dataclasses.replace(act, format=way.grid(bits))
    few = dataclasses.replace(way.spec(weights), act=act)
    outer = 32 if bits == 32 else 8
    image = activation(outer, signed=True)
    if low:
        own = way.estimator and qat.Estimator(way.estimator.weights, qat.lsq().activations)
        rest = qj.Policy([(name, few) for name in (*layers.between, layers.last)])
        first = qj.Policy([(layers.first, dataclasses.replace(few, act=image))])
        return [Part(rest, way.estimator), Part(first, own)]
    end = dataclasses.replace(preset_spec("w8"), observer=qj.mse())
    ends = [
        (layers.first, dataclasses.replace(end, act=image)),
        (layers.last, dataclasses.replace(end, act=activation(outer))),
    ]
    between = qj.Policy([(name, few) for name in layers.between])
    return [Part(between, way.estimator), Part(qj.Policy(ends), qat.lsq())]


def prepared(
    apply: Callable[..., Any], params: Any, parts: Sequence[Part], images: Sequence[Any]
) -> Any:
    """The tree that is trained, from scales that lose least of weights, and of activations on these
    batches of images, which only those ask for."""

    def of(part: Part) -> Any:
        found: dict[str, Any] = {"policy": part.policy}
        if any(spec.act for _, spec in part.policy.rules if spec):
            found = {"like": qj.calibrate(apply, params, images, part.policy)}
        return qat.prepare(params, **found, estimator=part.estimator)

    def either(one: Any, other: Any) -> Any:
        return one if isinstance(one, FakeQuantized) else other

    merge = functools.partial(jax.tree.map, either, is_leaf=is_quantized)
    return functools.reduce(merge, map(of, parts))
