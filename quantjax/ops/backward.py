"""How are the two gradient products of a layer rounded? Each by a spec of its own.

y = x W has dX = g W^T and dW = x^T g. Rounding both operands of both is training in low precision;
stochastic rounding keeps the gradients' means, without which small ones vanish.
Gupta et al. 2015, arXiv:1502.02551; Zhou et al. 2016, arXiv:1606.06160 (DoReFa); Banner et al.
2018, arXiv:1805.11046 (8-bit training, dX and dW in different precision)."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from quantjax.affine import fake_quantize_array, find_scales
from quantjax.ops.activation import activation_block
from quantjax.rounding import Rounding, noise
from quantjax.spec import Granularity, QuantSpec

Axes = tuple[int, ...]
Product = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backward:
    """How the operands of the gradient products are rounded; None leaves a product in float.

    input_gradient: of dX = g W^T, both g and W. weight_gradient: of dW = x^T g, both x and g. A
    spec's block is `Granularity.TENSOR` for one scale an operand; with any other an operand has
    one for all that one result sums over (a row of g, a channel of x). Scales are found anew in
    each call. `rounding=Rounding.STOCHASTIC` with absmax() leaves the mean of every gradient as it
    is. The products are those of floats, on rounded operands.

    Raises ValueError for a spec that says more than that.

    >>> from quantjax import IntFormat
    >>> Backward(input_gradient=QuantSpec(format=IntFormat(8), rounding=Rounding.STOCHASTIC))
    Backward(input_gradient=QuantSpec(int8, rounding=STOCHASTIC), weight_gradient=None)
    """

    input_gradient: QuantSpec | None = None
    weight_gradient: QuantSpec | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            spec = getattr(self, field.name)
            if spec is None:
                continue
            if not isinstance(spec, QuantSpec):
                raise ValueError(f"Backward: {field.name} must be a QuantSpec or None: {spec!r}.")
            more = spec.act is not None or spec.group is not None or spec.scale_format is not None
            if more or spec.static or spec.stacked or not isinstance(spec.block, Granularity):
                raise ValueError(
                    f"Backward: {field.name}: operands of a gradient product have one float scale "
                    f"a row or a tensor (Granularity), found in each call; got {spec!r}."
                )

    @property
    def stochastic(self) -> bool:
        """Whether it takes a key."""
        specs = (self.input_gradient, self.weight_gradient)
        return any(s is not None and s.rounding is Rounding.STOCHASTIC for s in specs)

    def __str__(self) -> str:
        named = (("dX", self.input_gradient), ("dW", self.weight_gradient))
        return ", ".join(f"{name} {spec.format}" for name, spec in named if spec is not None)


class GradientAxes(NamedTuple):
    """The axes that the gradient products sum over: dX those of y and W, dW those of y and x."""

    input_y: Axes
    input_w: Axes
    weight_y: Axes
    weight_x: Axes


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def with_rounded_gradients(
    product: Product,
    backward: Backward,
    axes: GradientAxes,
    x: Any,
    w: Any,
    rest: Sequence[Any],
    key: Any,
) -> jax.Array:
    """product(x, w, *rest), linear in x and in w, whose gradients with respect to x and w are
    computed from rounded operands, as `backward` says; none reaches `rest`.

    The noise depends on `key` and on the bits of the gradient that comes in, so that a weight used
    many times, by the steps of a recurrent network say, does not meet the same noise each time.
    """
    return product(x, w, *rest)


def _forward(product, backward, axes, x, w, rest, key):
    return product(x, w, *rest), (x, w, rest, key)


def _backward(product, backward, axes, residuals, g):
    x, w, rest, key = residuals
    keys: Any = (None,) * 4
    if key is not None:
        bits = lax.bitcast_convert_type(g.astype(jnp.float32), jnp.uint32)
        keys = jax.random.split(jax.random.fold_in(key, jnp.sum(bits, dtype=jnp.uint32)), 4)
    spec = backward.input_gradient
    g_dx, w_dx = _rounded(g, spec, axes.input_y, keys[0]), _rounded(w, spec, axes.input_w, keys[1])
    (dx,) = jax.linear_transpose(lambda x: product(x, w_dx, *rest), x)(g_dx)
    spec = backward.weight_gradient
    g_dw = _rounded(g, spec, axes.weight_y, keys[2])
    x_dw = _rounded(x, spec, axes.weight_x, keys[3])
    (dw,) = jax.linear_transpose(lambda w: product(x_dw, w, *rest), w)(g_dw)
    return dx, dw, None, None


with_rounded_gradients.defvjp(_forward, _backward)


def _rounded(x: jax.Array, spec: QuantSpec | None, summed: Axes, key: Any) -> jax.Array:
    if spec is None:
        return x
    spec = spec.with_block(activation_block(x.ndim, spec, summed))
    return fake_quantize_array(
        x, find_scales(x, spec), noise(spec.rounding, key, x.shape), spec=spec
    )
