"""What is odd about a layer's weights, and what did a format do to them?

Seen as the matrix that its products multiply by (`quantjax.ptq.matrix`): outliers, channels of
very different sizes, dead ones; the squared error split in what is clipped and what is rounded,
and how many of the levels of a scale are used."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from quantjax.affine import codes_of, dequantize_array, scale_values
from quantjax.blocks import sizes, spread
from quantjax.formats import Codebook, ExponentFormat, IntFormat
from quantjax.interpret.record import Site
from quantjax.ptq.matrix import MatrixForm, matrix_form
from quantjax.qtensor import QTensor
from quantjax.scales import inverse

OUTLIER = 4.0  # a channel whose largest weight is so many times that of the median channel
DEAD = 1e-3  # a channel whose largest weight is so small a part of the median channel's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Channels:
    """count: how many there are. outliers, dead: how many have a largest weight above 4 times,
    below a thousandth of the median channel's. spread: the largest channel over the median."""

    count: int
    outliers: int
    dead: int
    spread: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """Facts of one layer. kurtosis: E w^4 / (E w^2)^2, 3 for a normal sample. peak: the largest
    magnitude over the 99.9th percentile. inputs, outputs: its channels."""

    shape: tuple[int, ...]
    rms: float
    kurtosis: float
    peak: float
    inputs: Channels
    outputs: Channels

    @property
    def size(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rounded:
    """What a format does to a layer. sqnr_db: of the weights. clipping: the part of the squared
    error that is of clipped weights. used, levels: how many different levels the weights of one
    scale take on average, and how many they could: those of the format, or one each."""

    sqnr_db: float
    clipping: float
    used: float
    levels: int


def forms(layers: dict[str, tuple[int, ...]], sites: tuple[Site, ...]) -> dict[str, MatrixForm]:
    """How each parameter multiplies: of its first product; of what has none, a row an output."""
    found: dict[str, MatrixForm] = {}
    for site in sites:
        form = matrix_form(site)
        if site.path in layers and form is not None:
            found.setdefault(site.path, form)
    return found


def matrix(w: np.ndarray, form: MatrixForm | None, layers: int) -> Float[np.ndarray, "l o i"]:
    """Every layer as one matrix: outputs (those of experts and groups one after another) x inputs.
    Without a product the last axis is the inputs."""
    count = math.prod(w.shape[:layers])
    if form is None:
        return w.reshape(count, -1, w.shape[-1])
    rest = [a for a in form.batch if a >= layers]
    order = [*range(layers), *rest, *form.output, *form.contracting]
    inputs = math.prod(w.shape[a] for a in form.contracting)
    return w.transpose(order).reshape(count, -1, inputs)


def facts(w_OI: Float[np.ndarray, "o i"], shape: tuple[int, ...]) -> Weights:
    """The facts of one layer."""
    w = np.abs(w_OI.astype(np.float64))
    square = np.mean(w**2)
    high = float(np.quantile(w, 0.999))
    return Weights(
        shape=shape,
        rms=float(np.sqrt(square)),
        kurtosis=float(np.mean(w**4) / square**2) if square else 0.0,
        peak=float(w.max()) / high if high else 0.0,
        inputs=_channels(w.max(0)),
        outputs=_channels(w.max(1)),
    )


def _channels(largest: np.ndarray) -> Channels:
    alive = largest[largest > 0]
    median = float(np.median(alive)) if alive.size else 0.0
    return Channels(
        count=largest.size,
        outliers=int((largest > OUTLIER * median).sum()),
        dead=int((largest <= DEAD * median).sum()),
        spread=float(largest.max()) / median if median else 0.0,
    )


def rounded(w: np.ndarray, q: QTensor, layers: int) -> list[Rounded]:
    """What became of every layer of a leaf."""
    w = np.asarray(w, np.float32)
    count = math.prod(w.shape[:layers])
    values, codes, clipped = jax.device_get(_inspected(w, q))
    error = (values - w).astype(np.float64) ** 2
    clipped = clipped.reshape(count, -1)
    error, energy = error.reshape(count, -1), (w.astype(np.float64) ** 2).reshape(count, -1)
    used, most = _used(codes, q, count)
    out = []
    for k in range(count):
        lost, whole = error[k].sum(), energy[k].sum()
        ratio = np.inf if not lost else 10 * np.log10(whole / lost) if whole else -np.inf
        out.append(
            Rounded(
                sqnr_db=float(ratio),
                clipping=float(error[k][clipped[k]].sum() / lost) if lost else 0.0,
                used=float(used[k]),
                levels=most,
            )
        )
    return out


@jax.jit  # one program for leaves of one shape and format
def _inspected(w: Float[Array, "*w"], q: QTensor) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The values and the codes of q, and which weights lie outside all cells of their grid."""
    return dequantize_array(q).astype(jnp.float32), codes_of(q), _clipped(w, q)


def _clipped(w: Float[Array, "*w"], q: QTensor) -> jax.Array:

    def each(x: Any) -> Any:
        return spread(x, w.shape, q.block)

    assert not isinstance(q.format, ExponentFormat)  # that is the format of scales alone
    v = w * each(inverse(scale_values(q.scale)))
    if isinstance(q.format, Codebook):
        return q.format.clips(v, q.codebook)
    if isinstance(q.format, IntFormat):
        zero = None if q.zero_point is None else each(q.zero_point.astype(np.float32))
        return q.format.clips(v, zero)
    return q.format.clips(v)


def _used(codes: np.ndarray, q: QTensor, count: int) -> tuple[np.ndarray, int]:
    """How many codes the weights of one scale use, on average over each layer, and the most."""
    assert not isinstance(q.format, ExponentFormat)
    codes = codes.astype(np.int64) & 255
    size = sizes(codes.shape, q.block)
    block = np.zeros((1,) * codes.ndim, np.int64)
    for axis, (n, b) in enumerate(zip(codes.shape, size, strict=True)):
        index = (np.arange(n) // b).reshape([-1 if a == axis else 1 for a in range(codes.ndim)])
        block = block * -(-n // b) + index
    blocks = int(block.max()) + 1 if codes.size else 1
    seen = np.zeros((blocks, 256), bool)
    seen[np.broadcast_to(block, codes.shape).ravel(), codes.ravel()] = True
    return seen.sum(1).reshape(count, -1).mean(1), min(len(q.format.grid), math.prod(size))
