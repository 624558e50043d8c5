"""How is a parameter a stack of matrices? As its products sum over it.

Every method here works on one weight matrix w_OI and what is known of its inputs; this says which
axes of a leaf are outputs O, which inputs I, and which count matrices B: the layers of a scan, the
experts, the groups of a convolution. A convolution is the product with its unfolded window."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from quantjax.affine import Scales, scale_values
from quantjax.blocks import spread
from quantjax.formats import Codebook, Format, IntFormat
from quantjax.interpret.record import Site
from quantjax.scales import inverse
from quantjax.spec import QuantSpec


class Cells(NamedTuple):
    """The grid under every weight: its step, code of zero, and levels of a learned codebook.

    scale, zero_point: float32, broadcastable to the matrix (or to the stack of matrices).
    codebook: (2^bits,), or one for each matrix of the stack.
    """

    scale: Float[Array, "*#w"]
    zero_point: Float[Array, "*#w"] | None = None
    codebook: Float[Array, "*b levels"] | None = None


def on_grid(w: Float[Array, "*w"], cells: Cells, format: Format) -> Float[Array, "*w"]:
    """D(Q(w)): the nearest value that each weight can take, element by element."""
    v = w * inverse(cells.scale)
    if isinstance(format, Codebook):
        levels = format.decode(format.encode(v, None, cells.codebook), cells.codebook)
    elif isinstance(format, IntFormat):
        levels = format.decode(format.encode(v, None, cells.zero_point))
    else:
        levels = format.decode(format.encode(v, None))
    if cells.zero_point is not None:
        levels = levels - cells.zero_point
    return levels * cells.scale


@dataclasses.dataclass(frozen=True)
class MatrixForm:
    """The axes of a leaf, layers included: of what counts matrices, of outputs, of inputs in the
    order of the activation's features; by how many blocks of outputs the inputs differ; and how
    many of the last axes of inputs are the window of a convolution."""

    batch: tuple[int, ...]
    output: tuple[int, ...]
    contracting: tuple[int, ...]
    groups: int = 1
    window: int = 0

    @property
    def _order(self) -> tuple[int, ...]:
        return (*self.batch, *self.output, *self.contracting)

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(B, O, I) of a leaf of this shape."""
        kinds = (self.batch, self.output, self.contracting)
        b, o, i = (math.prod(shape[a] for a in axes) for axes in kinds)
        return b * self.groups, o // self.groups, i

    def matrices(self, x: Float[Array, "*leaf"]) -> Float[Array, "b o i"]:
        """The leaf as its stack of matrices."""
        return jnp.transpose(x, self._order).reshape(self.sizes(x.shape))

    def leaf(self, w_BOI: Float[Array, "b o i"], shape: tuple[int, ...]) -> Float[Array, "*leaf"]:
        """The leaf of this shape that has these matrices."""
        x = w_BOI.reshape([shape[a] for a in self._order])
        return jnp.transpose(x, [self._order.index(a) for a in range(len(shape))])

    def inner(self, layers: int) -> "MatrixForm":
        """The form of a leaf without its first axes, which count matrices here."""
        batch, output, contracting = (
            tuple(a - layers for a in axes if a >= layers)
            for axes in (self.batch, self.output, self.contracting)
        )
        return MatrixForm(batch, output, contracting, self.groups, self.window)

    def cells(self, scales: Scales, spec: QuantSpec, shape: tuple[int, ...]) -> Cells:
        """The grid under every element, as matrices of the same form."""

        def each(per_block: jax.Array) -> jax.Array:
            whole = spread(per_block.astype(jnp.float32), shape, spec.block_shape)
            return self.matrices(jnp.broadcast_to(whole, shape))

        zero = None if scales.zero_point is None else each(scales.zero_point)
        codebook = scales.codebook
        if codebook is not None:  # one for each layer
            codebook = codebook.reshape(-1, codebook.shape[-1])
            codebook = jnp.repeat(codebook, self.sizes(shape)[0] // len(codebook), axis=0)
        return Cells(each(scale_values(scales.scale)), zero, codebook)


def matrix_form(site: Site) -> MatrixForm | None:
    """The form that a product asks for; None where it sums over no axis, as a look-up of rows."""
    if not site.contracting:
        return None

    def below(axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(a + site.layers for a in axes)

    layers = tuple(range(site.layers))
    axes = (*layers, *below(site.batch)), below(site.output), below(site.contracting)
    if "conv" not in site.primitive:
        return MatrixForm(*axes)
    return MatrixForm(*axes, site.groups, len(site.contracting) - 1)
