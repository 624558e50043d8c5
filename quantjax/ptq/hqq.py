"""HQQ: which zero point makes most weights fall next to a level? Without data.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023,
mobiusml.github.io/hqq_blog. The errors are measured by an l_p norm with p < 1, so that a few large
ones count little: argmin_z sum |W - (q - z) s|^p by half-quadratic splitting, in closed form in
each step. The zero point is a float, no code; only it moves, the scales are those of the range."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from quantjax import affine
from quantjax.affine import Scales, scale_values
from quantjax.blocks import split
from quantjax.formats import IntFormat, Levels
from quantjax.interpret.intercept import sites
from quantjax.interpret.method import Run
from quantjax.observers import absmax, minmax
from quantjax.paths import named_leaves
from quantjax.policy import Policy, Resolved, preset
from quantjax.qtensor import QTensor
from quantjax.rounding import Rounding
from quantjax.spec import QuantSpec

STEPS = 20
BETA, GROWTH = np.float32(10), np.float32(1.01)


def hqq_scales(x: Float[Array, "*n"], spec: QuantSpec, p: float = 0.7) -> Scales:
    """The scales of `spec`, with the zero points of HQQ. `spec` is asymmetric, as `hqq_spec` gives.

    With v = x / s in units of the step, q = clip(round(v + z)), e = shrink(v - (q - z)) and
    z <- mean(q - v + e), shrink(e) = sign(e) max(0, |e| - |e|^(p - 1) / beta), beta growing by 1 %
    a step. (The authors' code measures errors in units of x, so that what they gain depends on the
    units.) Of the steps of every block the one with the least |v - (q - z)|^p is taken.
    """
    found, format = affine.find_scales(x, spec), spec.format
    assert found.zero_point is not None and isinstance(format, IntFormat)
    blocks = split(x.astype(jnp.float32), spec.block_shape)
    scale = scale_values(found.scale)
    valid = np.float32(1) if blocks.valid is None else blocks.valid.astype(jnp.float32)
    count = jnp.broadcast_to(valid, blocks.values.shape).sum(blocks.axes) if blocks.axes else 1
    v = blocks.values / jnp.expand_dims(scale, blocks.axes)
    power = np.float32(p)

    def total(values: jax.Array) -> jax.Array:
        return (values * valid).sum(blocks.axes) if blocks.axes else values

    def errors(zero: jax.Array) -> tuple[jax.Array, jax.Array]:
        zero = jnp.expand_dims(zero, blocks.axes)
        codes = format.encode(v, None, zero)
        return codes, v - (codes - zero)

    def loss(error: jax.Array) -> jax.Array:
        return total(jnp.abs(error) ** power)

    def step(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        zero, best, least = state
        codes, error = errors(zero)
        size = jnp.abs(error)
        less = jnp.where(size > 0, size, 1) ** (power - 1) / (
            BETA * GROWTH ** i.astype(jnp.float32)
        )
        kept = jnp.sign(error) * jnp.maximum(size - less, 0)
        zero = total(codes - v + kept) / count
        # Beyond the codes a zero point only clips; it may wander there where a block is constant.
        zero = jnp.clip(zero, np.float32(format.qmin), np.float32(format.qmax))
        found = loss(errors(zero)[1])
        lower = found < least
        return zero, jnp.where(lower, zero, best), jnp.where(lower, found, least)

    zero = found.zero_point.astype(jnp.float32)
    start = (zero, zero, loss(errors(zero)[1]))
    return found._replace(zero_point=lax.fori_loop(0, STEPS, step, start)[1])


@functools.partial(jax.jit, static_argnames=("spec", "p"))
def hqq_array(x: Float[Array, "*n"], spec: QuantSpec, p: float = 0.7) -> QTensor:
    """One array under `hqq_spec(spec)`, whose block is a shape."""
    return affine.quantize_array(x, hqq_scales(x, spec, p), spec=spec)


def hqq_spec(spec: QuantSpec, path: str = "") -> QuantSpec:
    """The same with a zero point, and all codes of the integer: half levels differ from these by a
    zero point of one half. Raises ValueError, with the path, where HQQ does not apply."""
    format = spec.format
    if not isinstance(format, IntFormat) or spec.scale_format is not None:
        raise ValueError(f"{path}: HQQ needs integers with float scales, got {spec!r}.")
    if spec.rounding is not Rounding.NEAREST:
        raise ValueError(f"{path}: HQQ rounds to nearest, got {spec.rounding}.")
    if format.signed:
        format = IntFormat(format.bits, levels=Levels.FULL)
    observer = minmax() if spec.observer == absmax() else spec.observer
    return dataclasses.replace(spec, format=format, symmetric=False, observer=observer)


@dataclasses.dataclass(frozen=True)
class HQQ:
    """The method; see `hqq`."""

    policy: Policy | Resolved | str
    p: float

    def __call__(self, run: Run) -> Run:
        """Every leaf of the policy, by itself."""
        run.floats_only("hqq")
        policy = preset(self.policy) if isinstance(self.policy, str) else self.policy
        if isinstance(policy, Resolved):
            resolved = policy.resolve(run.tree)
        else:
            resolved = policy.resolve(run.tree, sites(run.apply, run.tree, *run.batches[0]))
        named, structure = named_leaves(run.tree)
        leaves = []
        for path, leaf in named:
            spec = resolved[path].spec
            if spec is not None:
                leaf = self.on_leaf(path, leaf, spec)
            leaves.append(leaf)
        return dataclasses.replace(run, tree=jax.tree.unflatten(structure, leaves))

    def on_leaf(self, path: str, x: Any, spec: QuantSpec) -> QTensor:
        """One parameter under its resolved spec."""
        q = hqq_array(jnp.asarray(x), hqq_spec(spec, path), self.p)
        finite = jnp.isfinite(q.scale).all() & jnp.isfinite(q.zero_point).all()
        if not isinstance(finite, jax.core.Tracer) and not finite:
            raise ValueError(f"{path}: holds NaN or infinity; no scale covers that.")
        return q


def hqq(policy: Policy | Resolved | str, *, p: float = 0.7) -> HQQ:
    """The method that fits the zero points of all integer weights, without data.

    argmin_z sum |W - (q - z) s|^p, q = clip(round(W / s + z)), for every block of the policy, which
    gets a zero point (a float32: group 64 pays half a bit a weight) and all codes of the integer.
    s is of the range that the policy's observer finds; minmax() in place of absmax(). The batches
    of `calibrate` are not used, but to see which axes products sum over; `quantize_file` takes the
    method without any. Raises ValueError, with the path, for formats other than integers and for
    NaN or infinity. Source: Badri and Shaji 2023, HQQ.

    >>> import quantjax as qj
    >>> params = {"kernel": jax.random.normal(jax.random.key(1), (64, 4)) + 0.3}
    >>> found = qj.calibrate(lambda p, x: x @ p["kernel"], params, [jnp.ones((1, 64))], hqq("w3"))
    >>> found["kernel"].zero_point.dtype
    dtype('float32')
    """
    if not 0 < p <= 2:
        raise ValueError(f"hqq: p must be in (0, 2], got {p!r}.")
    return HQQ(policy, float(p))
