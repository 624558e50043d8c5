"""Up or down? A choice between the two levels next to each weight, soft at first, hard at the end.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", 2020,
arXiv:2004.10568, section 3.2; the rectified sigmoid is from Louizos et al. 2018, arXiv:1712.01312,
the optimizer from Kingma and Ba 2015, arXiv:1412.6980."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from quantjax.formats import Codebook, Format, IntFormat, is_learned
from quantjax.ptq.matrix import Cells
from quantjax.scales import inverse

LOW, HIGH = np.float32(-0.1), np.float32(1.1)  # between which the sigmoid is stretched, then cut


class Neighbours(NamedTuple):
    """The levels below and above each weight, in units of the weights, both on its grid. A weight
    on a level, or beyond the ends of the grid, has that level as one of the two."""

    low: Float[Array, "*w"]
    high: Float[Array, "*w"]


def neighbours(w: Float[Array, "*w"], cells: Cells, format: Format) -> Neighbours:
    """The two levels between which every weight lies, for any format.

    >>> from quantjax.formats import IntFormat
    >>> two = neighbours(jnp.array([0.8, -9.0]), Cells(jnp.float32(0.5)), IntFormat(3))
    >>> two.low.tolist(), two.high.tolist()
    ([0.5, -1.5], [1.0, -1.0])
    """
    v = w.astype(jnp.float32) * inverse(cells.scale)
    zero = np.float32(0) if cells.zero_point is None else cells.zero_point.astype(jnp.float32)
    if isinstance(format, IntFormat):
        offset = np.float32(format.lowest - format.qmin)
        code = jnp.floor(v + zero - offset)
        code = jnp.clip(code, np.float32(format.qmin), np.float32(format.qmax - 1))
        levels = (format.decode(code) - zero, format.decode(code + 1) - zero)
    else:
        learned = isinstance(format, Codebook) and is_learned(format)
        table = cells.codebook if learned else jnp.asarray(format.grid, jnp.float32)
        assert table is not None
        code = jnp.searchsorted(table, v, side="right") - 1
        code = jnp.clip(code, 0, table.shape[-1] - 2)
        levels = (table[code], table[code + 1])
    return Neighbours(*(level * cells.scale for level in levels))


def share(v: Float[Array, "*w"]) -> Float[Array, "*w"]:
    """h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1): how much of the way up a weight goes."""
    return jnp.clip((HIGH - LOW) * jax.nn.sigmoid(v) + LOW, 0, 1)


def start_at(w: Float[Array, "*w"], between: Neighbours) -> Float[Array, "*w"]:
    """The v with which every weight between its neighbours is what it was. Short of 0 and 1 by a
    hundredth, as there h has no gradient."""
    gap = between.high - between.low
    h = (w - between.low) * inverse(jnp.where(gap > 0, gap, np.float32(1)))
    h = jnp.clip(h, np.float32(0.01), np.float32(0.99))
    return -jnp.log((HIGH - LOW) / (h - LOW) - 1)


def softened(v: Float[Array, "*w"], between: Neighbours) -> Float[Array, "*w"]:
    """low + h(v) (high - low)."""
    return between.low + share(v) * (between.high - between.low)


def hardened(v: Float[Array, "*w"], between: Neighbours) -> Float[Array, "*w"]:
    """The nearer of the two levels: high where h(v) >= 1/2."""
    return jnp.where(v >= 0, between.high, between.low)


def indecision(v: Float[Array, "*w"], beta: Float[Array, ""]) -> Float[Array, ""]:
    """sum 1 - |2 h(v) - 1|^beta: 0 where every weight is on a level. A large beta spares all but
    those that nearly are; a small one pushes the rest as well."""
    distance = jnp.abs(2 * share(v) - 1)
    # At 0 the power's derivative is 0, but that of the logarithm in it is not.
    power = jnp.where(distance > 0, jnp.where(distance > 0, distance, 1) ** beta, 0)
    return jnp.sum(1 - power)


@dataclasses.dataclass(frozen=True)
class Anneal:
    """How the choice hardens over `steps`: for the first fifth without a push; from then on with
    `weight` times the indecision, its beta falling from 20 to 2 by half a cosine. The weight is
    that of one undecided parameter, against a loss that is 1 a parameter for plain rounding.
    rate: of the optimizer."""

    steps: int
    rate: float = 0.05
    weight: float = 10.0

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            raise ValueError(f"steps must be a positive integer, got {self.steps!r}.")

    def push(self, i: Any) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The weight of the indecision, and its beta, at step i."""
        t = jnp.asarray(i, jnp.float32) / self.steps
        along = jnp.clip((t - 0.2) / 0.8, 0, 1)
        beta = 2 + (20 - 2) * (1 + jnp.cos(math.pi * along)) / 2
        return jnp.where(t >= 0.2, jnp.float32(self.weight), 0), beta


class Adam(NamedTuple):
    """The optimizer's state: how many steps, and the moving averages of gradients and squares."""

    steps: Float[Array, ""]
    mean: Any
    square: Any


def adam_start(x: Any) -> Adam:
    """Before the first step on a tree of arrays."""
    zeros = jax.tree.map(jnp.zeros_like, x)
    return Adam(jnp.float32(0), zeros, zeros)


def adam(x: Any, gradient: Any, state: Adam, rate: Any) -> tuple[Any, Adam]:
    """One step at this rate, a number or one for each array; decays 0.9 and 0.99, the latter faster
    than usual as there are few steps."""
    n = state.steps + 1
    mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state.mean, gradient)
    square = jax.tree.map(lambda s, g: 0.99 * s + 0.01 * g * g, state.square, gradient)
    unbias = jnp.sqrt(1 - 0.99**n) / (1 - 0.9**n)

    def moved(x: Any, m: Any, s: Any, rate: Any) -> Any:
        return x - rate * unbias * m / (jnp.sqrt(s) + 1e-12)

    if isinstance(rate, float):
        rate = jax.tree.map(lambda _: rate, x)
    return jax.tree.map(moved, x, mean, square, rate), Adam(n, mean, square)
