"""The estimators, with the formats each is asked for: one table for all questions."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import quantjax as qj
from quantjax import formats, qat
from quantjax.formats import Format
from quantjax.policy import preset_spec
from quantjax.spec import Granularity, QuantSpec


class Case(NamedTuple):
    """estimator, and the presets or specs of weights it is for; act: of activations, or None."""

    estimator: qat.Estimator
    weights: tuple[str, ...]
    act: QuantSpec | None = None


def static(bits: int, *, symmetric: bool = True, format: Format | None = None) -> QuantSpec:
    """Of an activation, one calibrated scale; some of it is clipped, as bounds learn from that."""
    return QuantSpec(
        format=format or qj.IntFormat(bits, signed=False),
        block=Granularity.TENSOR,
        symmetric=symmetric,
        observer=qj.percentile(95.0),
        static=True,
    )


UAPOT = formats.apot(4, signed=False)
CASES = {
    "lsq": Case(qat.lsq(), ("w4", "w3", "w2", "w1"), static(4)),
    "lsq_plus": Case(qat.lsq_plus(), ("w4", "w2"), static(4, symmetric=False)),
    "dorefa": Case(qat.dorefa(), ("w4", "w2", "w1"), static(4)),
    "pact": Case(qat.pact(), ("w4",), static(4)),
    "apot": Case(qat.apot(), ("apot 4 bits", "apot 2 bits"), static(4, format=UAPOT)),
    "n2uq": Case(qat.n2uq(), ("w2",), static(2)),
    "twn": Case(qat.twn(), ("ternary",)),
    "ttq": Case(qat.ttq(), ("trained ternary",)),
    "bitnet": Case(qat.bitnet(), ("ternary",), preset_spec("w8a8").act),
    "binary_connect": Case(qat.binary_connect(), ("binary",)),
    "xnor": Case(qat.xnor(), ("binary",)),
    "ir_net": Case(qat.ir_net(), ("binary",)),
    "paretoq": Case(qat.paretoq(), ("w4", "w2", "ternary", "binary")),
}
SPECS = {
    "trained ternary": QuantSpec(format=qj.Codebook.learned(2), block=Granularity.TENSOR),
    "apot 4 bits": QuantSpec(format=formats.apot(4)),
    "apot 2 bits": QuantSpec(format=formats.apot(2)),
}


def spec_of(name: str) -> QuantSpec:
    return SPECS[name] if name in SPECS else preset_spec(name)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def mlp(p, x):
    return jax.nn.relu(x @ p["a"]["kernel"] + p["a"]["bias"]) @ p["b"]["kernel"]


PARAMS = {
    "a": {"kernel": normal(6, 8) / 2, "bias": normal(8, seed=1)},
    "b": {"kernel": normal(8, 3, seed=2) / 3},
}
X = normal(16, 6, seed=3)


def prepared(case: Case, weights: str, *, apply=mlp, params=PARAMS, x=X):
    """The tree that is trained, its activations calibrated where they are static."""
    spec = dataclasses.replace(spec_of(weights), act=case.act)
    policy = qj.Policy([("**/kernel", spec)])
    if case.act is not None and case.act.static:
        like = qj.calibrate(apply, params, [x], policy)
        return qat.prepare(params, like=like, estimator=case.estimator)
    sites = qj.sites(apply, params, x)
    return qat.prepare(params, policy, sites=sites, estimator=case.estimator)
