"""What of a parameter's inputs does post-training quantization need? Their moments.

The error of one output under quantized weights v is E(w.x - v.x)^2 = (w - v)' H (w - v) with
H = E[x x'], so that H is all that most methods ask of the data: Nagel et al. 2020,
arXiv:2004.10568, equation 8; Frantar et al. 2023, arXiv:2210.17323, section 3."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from quantjax.interpret.rows import Rows


class Moments(NamedTuple):
    """Of the inputs of B matrices, over all rows so far, in float32.

    rows: how many. h: E[x x']. cross: E[f x'], f being what the float model has where the
    quantized one has x; None where that was not observed. mean, float_mean: E[x], E[f].
    magnitude: E|x|. widest: max |x|. finite: whether all was finite.
    """

    rows: Float[Array, " b"]
    h: Float[Array, "b i i"]
    cross: Float[Array, "b i i"] | None
    mean: Float[Array, "b i"]
    float_mean: Float[Array, "b i"]
    magnitude: Float[Array, "b i"]
    widest: Float[Array, "b i"]
    finite: Bool[Array, " b"]


def no_moments(b: int, i: int, *, cross: bool) -> Moments:
    """Before the first row."""
    flat, square = jnp.zeros((b, i), jnp.float32), jnp.zeros((b, i, i), jnp.float32)
    rows, finite = jnp.zeros(b, jnp.float32), jnp.ones(b, bool)
    return Moments(rows, square, square if cross else None, flat, flat, flat, flat, finite)


def add_rows(m: Moments, rows: Rows, floats: Float[Array, "b t i"] | None = None) -> Moments:
    """The moments with more rows; `floats` are the same rows in the float model.

    Running means: m + (E_new - m) * n_new / n, which neither overflows nor forgets.
    """
    b = m.rows.shape[0]
    x = rows.x_BTI.astype(jnp.float32)
    f = x if floats is None else floats.astype(jnp.float32)
    finite = jnp.isfinite(x).all((1, 2)) & jnp.isfinite(f).all((1, 2))
    if rows.mine_BT is None:
        new = jnp.full(b, x.shape[1], jnp.float32)
        seen, seen_float = x, f
    else:
        mine = jnp.broadcast_to(rows.mine_BT, (b, x.shape[1]))
        new = mine.sum(1, dtype=jnp.float32)
        seen, seen_float = (jnp.where(mine[..., None], a, np.float32(0)) for a in (x, f))
    count = m.rows + new
    share = new / jnp.maximum(count, 1)

    def mixed(old: jax.Array, total: jax.Array) -> jax.Array:
        one = (slice(None),) + (None,) * (old.ndim - 1)
        average = total / jnp.maximum(new, 1)[one]
        return old + (average - old) * share[one]

    def outer(left: jax.Array) -> jax.Array:
        # Of the highest precision: bfloat16 products would cost a GPTQ its last digits.
        product = jnp.einsum("bti,btj->bij", left, seen, precision="highest")
        return jnp.broadcast_to(product, (b, *product.shape[1:]))

    return Moments(
        count,
        mixed(m.h, outer(seen)),
        None if m.cross is None else mixed(m.cross, outer(seen_float)),
        mixed(m.mean, seen.sum(1)),
        mixed(m.float_mean, seen_float.sum(1)),
        mixed(m.magnitude, jnp.abs(seen).sum(1)),
        jnp.maximum(m.widest, jnp.abs(seen).max(1, initial=0)),
        m.finite & finite,
    )
