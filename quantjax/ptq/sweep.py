"""How are columns rounded one by one, each hearing of the errors before it, at the speed of
matrix products? The recursion under GPTQ and under coordinate descent.

Frantar et al. 2022, arXiv:2210.17323, section 3.2, sum over blocks of columns lazily; here blocks
of three sizes lie within each other, so that all but the innermost sums are matrix products."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from quantjax.formats import Format
from quantjax.ptq.factor import exact_product
from quantjax.ptq.matrix import Cells, on_grid

LARGE, MIDDLE, SMALL = 512, 128, 32  # measured on two cores

# I inputs, O outputs. An input is a row here, so that what is rounded at once lies in one piece.


def sweep(
    base_IO: Float[Array, "i o"],
    origin_IO: Float[Array, "i o"],
    f_II: Float[Array, "i i"],
    weight_I: Float[Array, " i"],
    cells: Cells,
    format: Format,
) -> tuple[Float[Array, "i o"], Float[Array, " o"]]:
    """q_j = D(Q(v_j)) with v_j = base_j + sum_{k > j} F_kj (origin_k - q_k), from the last j to
    the first; and what that loses of every output, sum_j weight_j (v_j - q_j)^2.

    cells: of the transposed matrix, broadcastable to (I, O). Of F, what lies strictly below the
    diagonal is used; the rest must be finite. Costs some I^2 O multiplications and additions.
    """
    n = len(base_IO)
    blocks, sizes = _blocks(n)
    pad = blocks * sizes[0] - n

    def grown(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, pad), (0, 0)), mode="edge") if pad and len(x) > 1 else x

    # Rows that are added come first, and nothing hears of them: their rows of F are zeros.
    f_II = jnp.pad(f_II, ((0, pad), (0, pad)))
    weight_I = jnp.pad(weight_I, (0, pad))
    cells = each_cell(grown, cells)
    q_IO, lost_O = _swept(grown(base_IO), grown(origin_IO), f_II, weight_I, cells, format, sizes)
    return q_IO[:n], lost_O


def _blocks(n: int) -> tuple[int, tuple[int, ...]]:
    """How many of the largest blocks, and the sizes of blocks: each divides the one before."""
    small = max(min(SMALL, n), 1)
    blocks = -(-n // LARGE) if n > 2 * LARGE else 1
    parts = -(-n // (blocks * MIDDLE)) or 1
    pieces = -(-n // (blocks * parts * small)) or 1
    return blocks, (parts * pieces * small, pieces * small, small, 1)


def _rows(x: jax.Array, start: jax.Array, count: int) -> jax.Array:
    """Some rows of x, or x itself where its one row stands for all."""
    return x if len(x) == 1 else lax.dynamic_slice_in_dim(x, start, count, 0)


def each_cell(of: Callable[[jax.Array], jax.Array], cells: Cells) -> Cells:
    """The cells with their scales and zero points rearranged."""
    zero = None if cells.zero_point is None else of(cells.zero_point)
    return Cells(of(cells.scale), zero, cells.codebook)


def _swept(
    v_IO: jax.Array,
    origin_IO: jax.Array,
    f_II: jax.Array,
    weight_I: jax.Array,
    cells: Cells,
    format: Format,
    sizes: Sequence[int],
) -> tuple[jax.Array, jax.Array]:
    """Rounds blocks of sizes[0] rows, last to first; each hears of all after it, then recurs."""
    if not sizes:
        q_IO = on_grid(v_IO, cells, format)
        return q_IO, (weight_I * (v_IO - q_IO) ** 2)[0]
    (n, outputs), size = origin_IO.shape, sizes[0]
    count = n // size
    if count == 1:  # one block is what lies within it: fewer loops to compile
        return _swept(v_IO, origin_IO, f_II, weight_I, cells, format, sizes[1:])

    def block(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        q_IO, lost_O = state
        start = (count - 1 - i) * size
        heard = _heard(origin_IO, q_IO, f_II, start, size, whole=len(sizes) < 4)
        inner, lost = _swept(
            _rows(v_IO, start, size) + heard,
            _rows(origin_IO, start, size),
            lax.dynamic_slice(f_II, (start, start), (size, size)),
            _rows(weight_I, start, size),
            each_cell(lambda x: _rows(x, start, size), cells),
            format,
            sizes[1:],
        )
        return lax.dynamic_update_slice_in_dim(q_IO, inner, start, 0), lost_O + lost

    return lax.fori_loop(0, count, block, (origin_IO, jnp.zeros(outputs, jnp.float32)))


def _heard(
    origin_IO: jax.Array, q_IO: jax.Array, f_II: jax.Array, start: jax.Array, size: int, whole: bool
) -> Float[Array, "size o"]:
    """sum_k F_kj (origin_k - q_k) for the rows j of one block, over the blocks after it.

    Rows that are not rounded yet have q = origin, so the sum may run over the `whole` block above:
    one product, though half of it zeros. Of the largest blocks there may be many, and it does not.
    """
    if size == 1:  # a product of one row would not be vectorized
        return (lax.dynamic_slice_in_dim(f_II, start, 1, 1) * (origin_IO - q_IO)).sum(0)[None]
    if whole:
        return exact_product(lax.dynamic_slice_in_dim(f_II, start, size, 1).T, origin_IO - q_IO)

    def add(k: jax.Array, sum_IO: jax.Array) -> jax.Array:
        k = k * size
        f = lax.dynamic_slice(f_II, (k, start), (size, size))
        return sum_IO + exact_product(f.T, _rows(origin_IO, k, size) - _rows(q_IO, k, size))

    zeros = jnp.zeros((size, origin_IO.shape[1]), jnp.float32)
    return lax.fori_loop(start // size + 1, len(origin_IO) // size, add, zeros)
