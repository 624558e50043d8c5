"""Any levels at all: a code is an index into an ascending table.
Dettmers et al. 2023, arXiv:2305.14314 (NF4); Li et al. 2020, arXiv:1909.13144 (additive powers
of two); Han et al. 2016, arXiv:1510.00149 (learned codebooks)."""

import dataclasses
import itertools
import math
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from quantjax.formats.integer import check_bits


@dataclasses.dataclass(frozen=True)
class Codebook:
    """Any ascending levels; a code is an index. `Codebook.learned(bits)` fits them to the data.

    Ties go to the lower level. A learned codebook has no `values` of its own: they are an array
    on the QTensor, one table per tensor (per layer of a stacked one), found by `observers`.
    Raises ValueError if the values are not 2 to 256 distinct ascending numbers.

    >>> Codebook((-1.0, 0.0, 2.0)).bits, Codebook.learned(3).bits
    (2, 3)
    """

    values: tuple[float, ...] = ()
    name: str = "codebook"
    learned_bits: int | None = None

    def __post_init__(self) -> None:
        if self.learned_bits is not None:
            check_bits("Codebook.learned", self.learned_bits, 1, 8)
            return
        values = np.asarray(self.values, np.float32)
        if not 2 <= len(values) <= 256 or not np.all(np.isfinite(values)):
            raise ValueError(f"Codebook: 2 to 256 finite values expected, got {self.values}.")
        if not np.all(np.diff(values) > 0):
            raise ValueError(f"Codebook: the values must ascend, got {self.values}.")

    @classmethod
    def learned(cls, bits: int) -> "Codebook":
        """A codebook of 2^bits levels fitted to each tensor by (weighted) k-means."""
        return cls(name="kmeans", learned_bits=bits)

    @property
    def bits(self) -> int:
        """Bits of an index."""
        if self.learned_bits is not None:
            return self.learned_bits
        return max(1, math.ceil(math.log2(len(self.values))))

    @property
    def grid(self) -> np.ndarray:
        """All levels, ascending, float32; empty for a learned codebook."""
        return np.asarray(self.values, np.float32)

    @property
    def max_level(self) -> float:
        """The largest magnitude; 1 for a learned codebook, which lives in [-1, 1]."""
        return 1.0 if self.learned_bits is not None else float(np.abs(self.grid).max())

    @property
    def lowest(self) -> float:
        """The lowest level; -1 for a learned codebook."""
        return -1.0 if self.learned_bits is not None else float(self.grid[0])

    @property
    def has_zero(self) -> bool:
        """Whether zero is a level. A learned codebook may have none."""
        return 0.0 in self.values

    code_dtype = np.dtype(np.uint8)

    def __str__(self) -> str:
        return self.name if self.learned_bits is None else f"{self.name}{self.bits}"

    def encode(
        self,
        v: Float[Array, "*n"],
        noise: Float[Array, "*n"] | None = None,
        values: Float[Array, "*lead k"] | None = None,
    ) -> Float[Array, "*n"]:
        """Index of the level nearest to `v = x / scale`, as float32."""
        table = jnp.asarray(self.grid) if values is None else values
        v = jnp.clip(v, _spread(table[..., 0], v), _spread(table[..., -1], v))
        if noise is None:
            middle = (table[..., 1:] + table[..., :-1]) * np.float32(0.5)
            return count_below(v, middle)
        lower = count_below(v, table, inclusive=True) - 1
        lower = jnp.clip(lower, 0, np.float32(table.shape[-1] - 2))
        low, high = _lookup(table, lower), _lookup(table, lower + 1)
        # u < p is the upper level; v was clipped, so no product meets this difference.
        return jnp.where(noise < (v - low) / (high - low), lower + 1, lower)

    def decode(
        self,
        codes: Integer[Array, "*n"] | Float[Array, "*n"],
        values: Float[Array, "*lead k"] | None = None,
    ) -> Float[Array, "*n"]:
        """The level of each index, float32."""
        return _lookup(jnp.asarray(self.grid) if values is None else values, codes)

    def clips(
        self, v: Float[Array, "*n"], values: Float[Array, "*lead k"] | None = None
    ) -> jax.Array:
        """Where v is below or above the outermost cells, half a gap beyond their levels. Those of
        learned levels reach to the range they were learned from, [-1, 1], at least."""
        table = jnp.asarray(self.grid) if values is None else values
        half = np.float32(0.5)
        low = table[..., 0] - (table[..., 1] - table[..., 0]) * half
        high = table[..., -1] + (table[..., -1] - table[..., -2]) * half
        if values is not None:  # x / max|x| may round to just above 1
            low, high = jnp.minimum(low, -np.float32(1.001)), jnp.maximum(high, np.float32(1.001))
        return (v < _spread(low, v)) | (v > _spread(high, v))


def _spread(per_lead: Float[Array, "*lead"], like: jax.Array) -> jax.Array:
    """One value per leading index, shaped to broadcast against `like`."""
    return per_lead.reshape(per_lead.shape + (1,) * (like.ndim - per_lead.ndim))


def count_below(v: jax.Array, edges: jax.Array, inclusive: bool = False) -> Float[Array, "*n"]:
    """How many edges lie below each v (at or below, if inclusive), as float32."""
    above = jnp.greater_equal if inclusive else jnp.greater
    if edges.shape[-1] <= 16:  # compares fuse into the surrounding loop
        columns = (above(v, _spread(edges[..., k], v)) for k in range(edges.shape[-1]))
        return sum((c.astype(jnp.float32) for c in columns), jnp.zeros(v.shape, jnp.float32))
    side = "right" if inclusive else "left"

    def search(e, x):
        return jnp.searchsorted(e, x, side=side).astype(jnp.float32)

    for _ in range(edges.ndim - 1):
        search = jax.vmap(search)
    return search(edges, v)


def _lookup(table: Float[Array, "*lead k"], codes: jax.Array) -> jax.Array:
    def take(t, c):
        return jnp.take(t, c, mode="clip")

    for _ in range(table.ndim - 1):
        take = jax.vmap(take)
    return take(table, codes.astype(jnp.int32))


def make_nf4() -> Codebook:
    """Quantiles of the normal distribution: 8 above zero, 7 below, and zero itself."""
    offset, ppf = 0.9677083, NormalDist().inv_cdf
    positive = [ppf(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-ppf(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    levels = sorted([*negative, 0.0, *positive])
    return Codebook(tuple(float(np.float32(v / max(positive))) for v in levels), "nf4")


def apot(bits: int, signed: bool = True) -> Codebook:
    """Additive powers of two: signed sums of terms 0, 2^-i, ..., so a product is a few shifts.

    The magnitude bits, bits - 1 or, unsigned, all of them, make pairs of bits: each is a term of
    four values and, if one bit is left, that is a term of two; exponents are dealt out in turn.
    The largest level is 1. Source: Li et al. 2020, eq. 5.

    >>> apot(3).grid.tolist(), apot(2, signed=False).grid.tolist()
    ([-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0], [0.0, 0.25, 0.5, 1.0])
    """
    check_bits("apot", bits, 2, 8)
    pairs, odd = divmod(bits - signed, 2)
    terms: list[list[float]] = [[0.0] for _ in range(pairs + odd)]
    # First and second exponent of each four-valued term, the two-valued term, third exponents.
    order = list(range(pairs)) * 2 + [pairs] * odd + list(range(pairs))
    for exponent, term in enumerate(order, 1):
        terms[term].append(2.0**-exponent)
    sums = sorted({sum(choice) for choice in itertools.product(*terms)})
    positive = [s / sums[-1] for s in sums if s > 0]
    if not signed:
        return Codebook((0.0, *positive), f"uapot{bits}")
    return Codebook(tuple([-v for v in positive[::-1]] + [0.0] + positive), f"apot{bits}")
