"""Which scales lose least of a layer's output, rather than of its weights?

For an output with weights w and inputs x, E(w.x - v.x)^2 = (w - v)' H (w - v) with H = E[x x'] (the
layer-wise objective of Nagel et al. 2020, arXiv:2004.10568, equation 8). Every multiple of a
scale gives codes by rounding to nearest, and the scale that then fits them best is in closed form,
s = (l'Hw) / (l'Hl) for levels l. The best multiple is taken for every scale."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from quantjax.affine import Scales, scale_values
from quantjax.ptq.factor import exact_product
from quantjax.ptq.matrix import on_grid
from quantjax.ptq.refine import fitted
from quantjax.ptq.tiling import Tiling
from quantjax.scales import inverse
from quantjax.spec import QuantSpec

# B matrices of O outputs and I inputs; "s" is the shape of the scales.
MULTIPLES = np.geomspace(2.0, 0.15, 128).astype(np.float32)
WIDEST = 1024  # inputs whose errors are added with their signs while multiples are tried


def rounded_by_output(
    w_BOI: Float[Array, "b o i"],
    h_BII: Float[Array, "b i i"],
    scales: Scales,
    spec: QuantSpec,
    tiling: Tiling,
) -> tuple[Float[Array, "b o i"], Scales]:
    """Rounded to nearest at the best multiples of `scales`; the values, and the scales of their
    grid. Zero points and learned levels stay.

    Errors of inputs under different scales are taken as independent while multiples are tried (and
    beyond 1024 inputs under one scale, which bounds the work), not when scales are fitted at the
    end. An output for which all that is no better than `scales` keeps them. Raises ValueError for
    scales that are stored in few bits themselves: these can not be multiplied.
    """
    if spec.scale_format is not None:
        raise ValueError(f"{spec!r}: the scales have a grid of their own and can not be fitted.")
    cells = tiling.form.cells(scales, spec, tiling.shape)
    steps = scale_values(scales.scale)
    nearest = jax.vmap(lambda w, own: on_grid(w, own, spec.format))
    within = _Within(tiling, h_BII)
    aim_BOI = within.product(w_BOI)

    def tried(fraction: jax.Array) -> tuple[jax.Array, jax.Array]:
        q_BOI = nearest(w_BOI, cells._replace(scale=cells.scale * fraction))
        top = tiling.sums(q_BOI * aim_BOI)
        bottom = tiling.sums(q_BOI * within.product(q_BOI))
        fits = (top > 0) & (bottom > 0)
        factor = jnp.where(fits, top / jnp.where(fits, bottom, 1), 1)
        return factor, jnp.where(fits, 2 * factor * top - factor * factor * bottom, -jnp.inf)

    def better(best: tuple[jax.Array, ...], fraction: jax.Array) -> tuple[tuple, None]:
        factor, gain = tried(fraction)
        more = gain > best[0]
        own = (gain, jnp.broadcast_to(fraction, gain.shape), factor)
        return tuple(jnp.where(more, a, b) for a, b in zip(own, best, strict=True)), None

    one = jnp.ones(steps.shape, jnp.float32)
    start = (jnp.full(steps.shape, -jnp.inf), one, one)
    (_, fraction, factor), _ = lax.scan(better, start, jnp.asarray(MULTIPLES))

    def error(v_BOI: jax.Array) -> jax.Array:
        e_BOI = w_BOI - v_BOI
        return tiling.of_outputs((e_BOI * exact_product(e_BOI, h_BII)).sum(-1))

    def on(scale: jax.Array):
        return cells._replace(scale=tiling.spread(scale))

    def moved(v_BOI: jax.Array, ratio: jax.Array, scale: jax.Array) -> jax.Array:
        """The same codes at another scale; their values to the bit."""
        return nearest(v_BOI * tiling.spread(ratio), on(scale))

    best_BOI, scale = nearest(w_BOI, cells), steps
    lowest = error(best_BOI)
    own = steps * fraction * factor
    own_BOI = moved(nearest(w_BOI, on(steps * fraction)), factor, own)
    joint = fitted(w_BOI, own_BOI, h_BII, own, tiling)
    for v_BOI, other in ((own_BOI, own), (moved(own_BOI, joint * inverse(own), joint), joint)):
        found = error(v_BOI)
        lower = found < lowest
        best_BOI = tiling.where(lower, v_BOI, best_BOI)
        scale, lowest = jnp.where(lower, other, scale), jnp.where(lower, found, lowest)
    return best_BOI, scales._replace(scale=scale)


class _Within:
    """Products with the diagonal blocks of H alone, one for the inputs that share a scale."""

    def __init__(self, tiling: Tiling, h_BII: jax.Array) -> None:
        parts = []
        for block in np.unique(tiling.input_blocks):
            inputs = np.flatnonzero(tiling.input_blocks == block)
            parts += np.array_split(inputs, -(-len(inputs) // WIDEST))
        longest = max(map(len, parts))
        # The G parts, each filled up with an input that is not there.
        self._inputs_GK = np.stack(
            [np.pad(p, (0, longest - len(p)), constant_values=h_BII.shape[-1]) for p in parts]
        )
        rows, columns = self._inputs_GK[:, :, None], self._inputs_GK[:, None, :]
        self._h_BGKK = jnp.pad(h_BII, ((0, 0), (0, 1), (0, 1)))[:, rows, columns]

    def product(self, x_BOI: jax.Array) -> jax.Array:
        """x H over the inputs of the same part."""
        x_BOGK = jnp.pad(x_BOI, ((0, 0), (0, 0), (0, 1)))[:, :, self._inputs_GK]
        y_BOGK = jnp.einsum("bogk,bgkl->bogl", x_BOGK, self._h_BGKK, precision="highest")
        place = np.empty(x_BOI.shape[-1] + 1, np.int64)
        place[self._inputs_GK.reshape(-1)] = np.arange(self._inputs_GK.size)
        return y_BOGK.reshape(*x_BOI.shape[:2], -1)[:, :, place[:-1]]
