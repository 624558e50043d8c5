"""Which range of values should the grid cover? Observers of a block: init, update, finalize.

An observer is a frozen value; its state is a pytree. `update` may be called once (a weight) or
per batch (an activation); `finalize` returns the range (low, high) per block. Sources: Jacob et
al. 2018, arXiv:1712.05877 (min-max, moving average); Choukroun et al. 2019, arXiv:1902.06822
(squared error); Frantar et al. 2022 and the llmc toolkit (Lp error with shrinking range)."""

import dataclasses
import math
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from quantjax.blocks import Blocked
from quantjax.formats import Format, IntFormat
from quantjax.quantile import quantile
from quantjax.scales import HUGE, TINY, inverse, scale_of_range

Range = tuple[Float[Array, "*b"], Float[Array, "*b"]]


class Grid(NamedTuple):
    """What a search needs to know of the quantizer: its format and how scales are made."""

    format: Format
    symmetric: bool
    scale_format: Any = None


@runtime_checkable
class Observer(Protocol):
    """A frozen, hashable value with these three pure functions."""

    def init(self, grid: Grid) -> Any:
        """The empty state, before the first update."""

    def update(self, state: Any, x: Blocked, grid: Grid, weights: Any = None) -> Any:
        """The state after seeing the blocks of x."""

    def finalize(self, state: Any) -> Range:
        """The range (low, high) of every block."""


def _reduce(function, x: Blocked, values: jax.Array, fill: float) -> Float[Array, "*b"]:
    """Reduces the places of every block; those that are not valid count as `fill`."""
    if x.valid is not None:
        values = jnp.where(x.valid, values, np.float32(fill))
    out = function(values, axis=x.axes) if x.axes else values
    return out.astype(jnp.float32)


def _min_max(x: Blocked) -> Range:
    """The range of every block; short last blocks repeat their edge, which changes neither end."""
    poison = _poison(x)
    return x.values.min(x.axes) + poison, x.values.max(x.axes) + poison


def _poison(x: Blocked) -> Float[Array, "*b"]:
    """0 per block, or NaN where the block holds NaN or infinity."""
    return jnp.where(jnp.isfinite(magnitude(x)), np.float32(0), np.float32(np.nan))


def magnitude(x: Blocked) -> Float[Array, "*b"]:
    """max |x| per block; infinity where the block holds NaN or infinity.

    XLA on CPU drops NaN from the maximum of a larger array, and reduces anything but a plain
    array 8 times slower. So: the bits of |x| as an integer are ordered as |x| is, NaN last; one
    elementwise pass takes the maximum of 8 slices of an axis and turns NaN into infinity; what
    is left, an eighth, is a plain array. (16 slices are 8 times slower again.)"""
    values = x.values.astype(jnp.float32)
    bits = lax.bitcast_convert_type(values, jnp.int32) & np.int32(0x7FFFFFFF)
    if not x.axes:
        return lax.bitcast_convert_type(jnp.minimum(bits, np.int32(0x7F800000)), jnp.float32)
    axis = max(x.axes, key=lambda a: x.values.shape[a])
    for _ in range(3):
        if bits.shape[axis] % 2 == 0:
            bits = jnp.maximum(*jnp.split(bits, 2, axis))
    values = lax.bitcast_convert_type(jnp.minimum(bits, np.int32(0x7F800000)), jnp.float32)
    return lax.optimization_barrier(values).max(x.axes)


def _grown(state: Range | None, low: jax.Array, high: jax.Array) -> Range:
    if state is None:
        return low, high
    return jnp.minimum(state[0], low), jnp.maximum(state[1], high)


@dataclasses.dataclass(frozen=True, repr=False)
class _AbsMax:
    def __repr__(self) -> str:
        return "absmax()"

    def init(self, grid: Grid) -> None:
        return None

    def update(self, state: Range | None, x: Blocked, grid: Grid, weights: Any = None) -> Range:
        largest = magnitude(x)
        return _grown(state, -largest, largest)

    def finalize(self, state: Range) -> Range:
        return state


@dataclasses.dataclass(frozen=True, repr=False)
class _MinMax:
    def __repr__(self) -> str:
        return "minmax()"

    def init(self, grid: Grid) -> None:
        return None

    def update(self, state: Range | None, x: Blocked, grid: Grid, weights: Any = None) -> Range:
        return _grown(state, *_min_max(x))

    def finalize(self, state: Range) -> Range:
        return state


@dataclasses.dataclass(frozen=True, repr=False)
class _Ema:
    decay: float

    def __repr__(self) -> str:
        return f"ema({self.decay:g})"

    def init(self, grid: Grid) -> None:
        return None

    def update(self, state: Any, x: Blocked, grid: Grid, weights: Any = None) -> Any:
        low, high = _min_max(x)
        if state is None:
            return low, high
        d = np.float32(self.decay)
        return d * state[0] + (1 - d) * low, d * state[1] + (1 - d) * high

    def finalize(self, state: Any) -> Range:
        return state


@dataclasses.dataclass(frozen=True, repr=False)
class _Percentile:
    q: float

    def __repr__(self) -> str:
        return f"percentile({self.q:g})"

    def init(self, grid: Grid) -> None:
        return None

    def update(self, state: Any, x: Blocked, grid: Grid, weights: Any = None) -> Any:
        values = jnp.abs(x.values) if grid.symmetric else x.values
        poison = _poison(x)  # elements that are not finite must not pass

        def at(q: float) -> jax.Array:
            return (quantile(values, q, x.axes, x.valid) if x.axes else values) + poison

        high = at(self.q / 100)
        low = -high if grid.symmetric else at(1 - self.q / 100)
        if state is None:
            return low, high, jnp.float32(1)
        n = state[2]
        return (state[0] * n + low) / (n + 1), (state[1] * n + high) / (n + 1), n + 1

    def finalize(self, state: Any) -> Range:
        return state[0], state[1]


def _unit(x: Blocked, low: jax.Array, high: jax.Array) -> jax.Array:
    """1 / the range's magnitude as a power of two, which is exact, against x: errors in its units
    neither overflow nor vanish."""
    largest = jnp.clip(jnp.maximum(jnp.abs(low), jnp.abs(high)), TINY, HUGE)
    exponent = lax.bitcast_convert_type(largest, jnp.int32) & 0x7F800000
    return jnp.expand_dims(inverse(lax.bitcast_convert_type(exponent, jnp.float32)), x.axes)


def _error(
    x: Blocked,
    low: jax.Array,
    high: jax.Array,
    grid: Grid,
    weights: Any,
    p: float,
    unit: jax.Array,
) -> Float[Array, "*b"]:
    """Sum over each block of w |unit (x - D(Q(x)))|^p, for the grid that covers [low, high]."""
    scale, zero_point = _scales(low, high, grid)
    if zero_point is not None:
        zero_point = jnp.expand_dims(zero_point, x.axes)
    error = _loss(x.values, jnp.expand_dims(scale, x.axes), zero_point, grid, p, unit)
    return _reduce(jnp.sum, x, error if weights is None else error * weights, 0.0)


ROW = 2**14  # values that meet all ranges at a time: what they lose fits in a cache


def _errors(
    x: Blocked,
    low: Float[Array, "*b f"],
    high: Float[Array, "*b f"],
    grid: Grid,
    weights: Any,
    p: float,
    unit: jax.Array,
) -> Float[Array, "*b f"]:
    """`_error` for f ranges of every block, in one pass over x.

    A row of values meets all ranges before the next is read, which vectorizes over ranges: on CPU
    this takes a tenth of the time of a pass over x for each."""
    scale, zero_point = _scales(low, high, grid)
    kept = low.shape[:-1]
    n = x.values.size // max(math.prod(kept), 1)
    size = max(min(ROW // max(math.prod(kept), 1), n), 1)
    short = -n % size

    def rows(values: jax.Array) -> Float[Array, "r s *b"]:
        """The places of blocks first, cut in rows; zeros fill up the last."""
        values = jnp.broadcast_to(values, x.values.shape)
        flat = jnp.moveaxis(values, x.axes, tuple(range(len(x.axes)))).reshape(n, *kept)
        flat = jnp.pad(flat, [(0, short), *[(0, 0)] * len(kept)])
        return flat.reshape(-1, size, *kept)

    counted: jax.Array | None = None
    if short or weights is not None or x.valid is not None:
        counted = jnp.ones(()) if weights is None else weights
        counted = rows(counted if x.valid is None else jnp.where(x.valid, counted, 0))
    unit = unit.reshape(*kept, 1)

    def body(total: jax.Array, row: tuple[jax.Array, jax.Array | None]):
        values, count = row
        error = _loss(values[..., None], scale, zero_point, grid, p, unit)
        return total + (error if count is None else error * count[..., None]), None

    start = jnp.zeros((size, *low.shape), jnp.float32)
    return lax.scan(body, start, (rows(x.values), counted))[0].sum(0)


def _loss(
    values: jax.Array, scale: jax.Array, zero_point: Any, grid: Grid, p: float, unit: jax.Array
) -> jax.Array:
    """|unit (x - D(Q(x)))|^p of each value."""
    levels = grid.format.decode(_codes(values, scale, zero_point, grid))
    levels = levels if zero_point is None else levels - zero_point
    error = jnp.abs(values - levels * scale) * unit
    return error * error if p == 2 else error ** np.float32(p)


def _scales(low: jax.Array, high: jax.Array, grid: Grid) -> tuple[jax.Array, jax.Array | None]:
    return scale_of_range(
        low, high, grid.format, symmetric=grid.symmetric, scale_format=grid.scale_format
    )


def _codes(values: jax.Array, scale: jax.Array, zero_point: Any, grid: Grid) -> jax.Array:
    v = values * inverse(scale)
    if isinstance(grid.format, IntFormat):
        return grid.format.encode(v, None, zero_point)
    return grid.format.encode(v)


@dataclasses.dataclass(frozen=True, repr=False)
class _Mse:
    p: float
    steps: int
    lowest: float

    def __repr__(self) -> str:
        return f"mse({self.p:g}, steps={self.steps}, lowest={self.lowest:g})"

    def init(self, grid: Grid) -> None:
        return None

    def _fractions(self) -> Float[Array, " steps"]:
        return jnp.asarray(np.geomspace(1.0, self.lowest, self.steps), jnp.float32)

    def _widest(self, x: Blocked, grid: Grid) -> Range:
        if not grid.symmetric:
            return _min_max(x)
        largest = magnitude(x)
        return -largest, largest

    def search(self, x: Blocked, grid: Grid, weights: Any = None) -> Range:
        """The best range for x alone, in the memory of one error per block."""
        low, high = self._widest(x, grid)
        fractions, unit = self._fractions(), _unit(x, low, high)

        def body(i: jax.Array, best: tuple[jax.Array, jax.Array]):
            f = fractions[i]
            error = _error(x, low * f, high * f, grid, weights, self.p, unit)
            better = error < best[0]
            return jnp.where(better, error, best[0]), jnp.where(better, f, best[1])

        if low.size == 1:  # an activation, say: many blocks would gain little
            lows, highs = low[..., None] * fractions, high[..., None] * fractions
            errors = _errors(x, lows, highs, grid, weights, self.p, unit)
            best = fractions[jnp.argmin(errors, -1)]
        else:
            start = (jnp.full(low.shape, np.inf, jnp.float32), jnp.ones(low.shape, jnp.float32))
            best = lax.fori_loop(0, self.steps, body, start)[1]
        low, high = low * best, high * best
        if self.p == 2 and grid.symmetric and grid.scale_format is None:
            for _ in range(2):
                low, high = self._least_squares(x, low, high, grid, weights, unit)
        return low, high

    def _least_squares(
        self, x: Blocked, low: Any, high: Any, grid: Grid, weights: Any, unit: jax.Array
    ) -> Range:
        """The best scale for the codes as they are: s = sum(w x l) / sum(w l^2). The error falls
        here and falls again when the codes are rounded anew, so this never hurts."""
        scale = jnp.expand_dims(_scales(low, high, grid)[0], x.axes)
        levels = grid.format.decode(_codes(x.values, scale, None, grid))
        w = np.float32(1) if weights is None else weights
        top = _reduce(jnp.sum, x, w * (x.values * unit * levels), 0.0)
        bottom = _reduce(jnp.sum, x, w * (levels * levels), 0.0)
        high_new = top / bottom * np.float32(grid.format.max_level) / unit.reshape(top.shape)
        high = jnp.where((bottom > 0) & (high_new > 0), high_new, high)
        return -high, high

    def update(self, state: Any, x: Blocked, grid: Grid, weights: Any = None) -> Any:
        low, high = self._widest(x, grid) if state is None else state[:2]
        f, unit = self._fractions(), _unit(x, low, high)
        errors = _errors(x, low[..., None] * f, high[..., None] * f, grid, weights, self.p, unit)
        errors = jnp.moveaxis(errors, -1, 0)
        return low, high, errors if state is None else state[2] + errors

    def finalize(self, state: Any) -> Range:
        low, high, errors = state
        fraction = self._fractions()[jnp.argmin(errors, axis=0)]
        return low * fraction, high * fraction


def absmax() -> Observer:
    """The largest magnitude: [-max|x|, max|x|]. Nothing is clipped."""
    return _AbsMax()


def minmax() -> Observer:
    """[min x, max x], for asymmetric grids. Nothing is clipped."""
    return _MinMax()


def ema(decay: float = 0.99) -> Observer:
    """Moving average of the batches' [min, max]: r <- decay * r + (1 - decay) * r_batch.

    Raises ValueError unless 0 <= decay < 1. Source: Jacob et al. 2018, section 3.1.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"ema: decay must be in [0, 1), got {decay}.")
    return _Ema(float(decay))


def percentile(q: float) -> Observer:
    """Clips the 100 - q per cent largest magnitudes (each tail, if asymmetric).

    Linear interpolation within a batch; the mean over batches. Raises ValueError unless
    50 < q <= 100.
    """
    if not 50 < q <= 100:
        raise ValueError(f"percentile: q must be in (50, 100], got {q}.")
    return _Percentile(float(q))


def mse(p: float = 2.0, *, steps: int = 100, lowest: float = 0.02) -> Observer:
    """The range whose grid loses least: argmin_r sum w |x - D(Q(x; r))|^p.

    Tries `steps` shrunken copies of the widest range, from 1 down to `lowest` of it in equal
    ratios, so it is never worse than absmax; then, for p = 2 on a symmetric grid, fits the scale
    to the codes by least squares twice. `weights` of `quantize` weigh the elements. Over
    batches, the first sets the widest range. Raises ValueError for p <= 0, steps < 2 or lowest
    outside (0, 1).
    """
    if p <= 0 or steps < 2 or not 0 < lowest < 1:
        raise ValueError(f"mse: p > 0, steps >= 2, 0 < lowest < 1; got {p}, {steps}, {lowest}.")
    return _Mse(float(p), int(steps), float(lowest))


def observe(observer: Observer, x: Blocked, grid: Grid, weights: Any = None) -> Range:
    """The range of one array: a single update, or the observer's own search."""
    if isinstance(observer, _Mse):
        return observer.search(x, grid, weights)
    return observer.finalize(observer.update(observer.init(grid), x, grid, weights))
