"""How does a product use what a leaf keeps beside its codes, an input scale and low-rank factors?

The leaf stands for D * t + left @ right. The activation is multiplied by t in the axes that meet
it; then comes the product of the codes alone, in integers if both sides are; then the term of low
rank, two thin products of the activation as it was. All this in the axes of the view that the model
holds. Where they do not fit the product, the leaf stays whole, and is dequantized.
Lin et al. 2023, arXiv:2306.00978; Xiao et al. 2022, arXiv:2211.10438 (input scales); Zhang et al.
2024, arXiv:2402.02446 (low rank)."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives as p

from quantjax.interpret.param import Param
from quantjax.ops import ConvParams
from quantjax.qtensor import QTensor


class Taken(NamedTuple):
    """A product of a leaf, as one of its codes alone.

    activation: what they meet, scaled. leaf: the parameter without the rest; with it where this
    product can not use it. term: what is to be added to the result, if anything, and its flops.
    note: of all this, for the report.
    """

    activation: Any
    leaf: Param
    term: Callable[[], jax.Array] | None = None
    flops: int = 0
    note: str = ""

    def finish(self, y: jax.Array) -> jax.Array:
        """The result, from that of `activation` and `leaf`."""
        return y if self.term is None else (y + self.term()).astype(y.dtype)


class _Form(NamedTuple):
    """What a product does with the axes of the view of its parameter.

    summed, kept: the axes of which the outputs are sums, and those that the outputs have; axes of
    both sides are in both. scaled: those of the activation, along which t may vary. times(x, t) is
    the activation scaled, low_rank(x, left, right) the term, None if there is no such form; arrays
    come in the axes of the view, of length one where they are constant, and the rank last. flops:
    of the term, by rank.
    """

    summed: frozenset[int]
    kept: frozenset[int]
    scaled: frozenset[int]
    times: Callable[[Any, jax.Array], jax.Array]
    low_rank: Callable[[Any, jax.Array, jax.Array], jax.Array] | None
    flops: int


def taken_apart(eqn: Any, inputs: Sequence[Any], side: int) -> Taken:
    """The product of the parameter at `side`, as it is where it has nothing beside its codes."""
    x, activation = inputs[side], inputs[1 - side]
    q = x.value
    if not isinstance(q, QTensor) or q.is_bare:
        return Taken(activation, x)
    form = _form(eqn, inputs, side)
    scale = None if q.input_scale is None else in_view(x, q.input_scale)
    factors = None
    if q.left is not None and q.right is not None:
        factors = _by_axes(form, in_view(x, q.left), in_view(x, q.right))
    why = ""
    if form is None:
        why = "this product has other axes"
    elif scale is not None and not _varies(scale) <= form.scaled:
        why = "its input scale varies along axes that are not summed over here"
    elif q.left is not None and factors is None:
        why = "its low-rank factors do not part the axes summed over here from the others"
    if why or form is None:
        return Taken(activation, x, note=f"; dequantized whole: {why}")
    bare, scaled, notes = dataclasses.replace(x, value=q.bare), activation, ""
    if scale is not None:
        scaled, notes = form.times(activation, scale.astype(jnp.float32)), "; input scaled"
    if factors is None:
        return Taken(scaled, bare, note=notes)
    left, right = (a.astype(jnp.float32) for a in factors)
    low_rank = form.low_rank
    assert low_rank is not None
    return Taken(
        scaled,
        bare,
        lambda: low_rank(activation.astype(jnp.float32), left, right),
        q.rank * form.flops,
        f"{notes}; plus rank {q.rank} in float",
    )


def in_view(x: Param, a: jax.Array) -> jax.Array:
    """An array of the axes of the leaf, and more behind them, in the axes of the view: at full
    length, or of length one where it is constant."""
    leaf = x.value.shape
    shape, lengths = list(a.shape), []
    for group in x.axes:
        varies = any(a.shape[i] != 1 for i in group)
        for i in group:
            shape[i] = leaf[i] if varies else 1
        lengths.append(math.prod(shape[i] for i in group))
    order = [i for group in x.axes for i in group]
    order += [i for i in range(a.ndim) if i not in order]  # dropped ones have length one
    a = jnp.transpose(jnp.broadcast_to(a, shape), order)
    return a.reshape(*lengths, *shape[len(leaf) :])


def _varies(a: jax.Array) -> set[int]:
    return {i for i, n in enumerate(a.shape) if n != 1}


def _by_axes(
    form: _Form | None, left: jax.Array, right: jax.Array
) -> tuple[jax.Array, jax.Array] | None:
    """The factors, first the one that varies along what is summed over; None if none does alone."""
    if form is None or form.low_rank is None:
        return None
    last = {left.ndim - 1}
    for first, second in ((left, right), (right, left)):
        if _varies(first) - last <= form.summed and _varies(second) - last <= form.kept:
            return first, second
    return None


def _full(a: jax.Array, shape: Sequence[int], axes: Sequence[int]) -> jax.Array:
    """These axes of a, at their full length, and its last one; the others have length one."""
    a = jnp.broadcast_to(a, [shape[i] if i in axes else n for i, n in enumerate(a.shape)])
    order = [*axes, *(i for i in range(a.ndim - 1) if i not in axes), a.ndim - 1]
    return jnp.transpose(a, order).reshape(*(shape[i] for i in axes), a.shape[-1])


def _form(eqn: Any, inputs: Sequence[Any], side: int) -> _Form | None:
    if eqn.primitive is p.dot_general_p:
        return _dot(eqn, inputs, side)
    if eqn.primitive is p.conv_general_dilated_p:
        return _convolution(eqn, inputs)
    return _ragged_dot(eqn, inputs)


def _dot(eqn: Any, inputs: Sequence[Any], side: int) -> _Form:
    view, activation = inputs[side].shape, inputs[1 - side]
    (summed, shared), out = eqn.params["dimension_numbers"], eqn.outvars[0].aval.shape
    pairs = [*zip(summed[1 - side], summed[side]), *zip(shared[1 - side], shared[side])]  # noqa: B905
    met = dict(sorted(pairs))  # by axis of the activation, that of the view
    free = [a for a in range(len(view)) if a not in met.values()]
    rows = [a for a in range(activation.ndim) if a not in met]
    # For einsum: an axis of the view is its own number, a row of the activation comes after them.
    rank, of_rows = len(view), [len(view) + 1 + a for a in rows]
    of_x = [met.get(a, len(view) + 1 + a) for a in range(activation.ndim)]
    both, outer = [*summed[side], *shared[side]], [*shared[side], *free]
    of_y = [*shared[side], *(of_rows + free if side == 1 else free + of_rows)]

    def times(x: Any, t: jax.Array) -> jax.Array:
        t = jnp.transpose(t, [*met.values(), *free])
        lengths = iter(t.shape)
        return x * t.reshape([next(lengths) if a in met else 1 for a in range(x.ndim)])

    def low_rank(x: Any, left: jax.Array, right: jax.Array) -> jax.Array:
        inner = (_full(left, view, both), [*both, rank])
        thin = jnp.einsum(x, of_x, *inner, [*shared[side], *of_rows, rank])
        of_thin = [*shared[side], *of_rows, rank]
        return jnp.einsum(thin, of_thin, _full(right, view, outer), [*outer, rank], of_y)

    flops = 2 * (math.prod(activation.shape) + math.prod(out))
    inside = frozenset(both)
    return _Form(inside, frozenset(outer), inside, times, low_rank, flops)


def _convolution(eqn: Any, inputs: Sequence[Any]) -> _Form:
    view = inputs[1].shape
    params = ConvParams(**{name: eqn.params[name] for name in ConvParams._fields})
    numbers, groups = params.dimension_numbers, params.feature_group_count
    output, channel, *window = numbers.rhs_spec
    out = eqn.outvars[0].aval.shape

    def times(x: Any, t: jax.Array) -> jax.Array:
        t = jnp.tile(t.reshape(-1), groups if t.size > 1 else 1)
        return x * t.reshape([-1 if a == numbers.lhs_spec[1] else 1 for a in range(x.ndim)])

    def low_rank(x: Any, left: jax.Array, right: jax.Array) -> jax.Array:
        """A convolution of r outputs a group, then one of a single place, as a product."""
        left = _full(left, view, [channel, *window])
        kernel = jnp.tile(left, groups)  # (inputs, *window, outputs), to the model's order
        kernel = jnp.transpose(kernel, np.argsort([channel, *window, output]).tolist())
        thin = lax.conv_general_dilated(x, kernel, **params._asdict())
        thin = jnp.moveaxis(thin, numbers.out_spec[1], -1)
        thin = thin.reshape(*thin.shape[:-1], groups, -1)
        right = _full(right, view, [output]).reshape(groups, -1, right.shape[-1])
        y = jnp.einsum("...gr,gor->...go", thin, right)
        return jnp.moveaxis(y.reshape(*y.shape[:-2], -1), -1, numbers.out_spec[1])

    places = math.prod(out) // max(out[numbers.out_spec[1]], 1)
    reads = groups * math.prod(view[a] for a in (channel, *window))
    return _Form(
        frozenset((channel, *window)),
        frozenset((output,)),
        frozenset((channel,)),
        times,
        low_rank if params.batch_group_count == 1 else None,
        2 * (places * reads + math.prod(out)),
    )


def _ragged_dot(eqn: Any, inputs: Sequence[Any]) -> _Form | None:
    """Of (T, K) x (E, K, N) alone."""
    tokens, experts, *rest = inputs
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    if len(rest) != 1 or not is_plain_ragged(numbers, tokens):
        return None
    sizes = rest[0]
    view, out = experts.shape, eqn.outvars[0].aval.shape

    def times(x_TK: Any, t_EKN: jax.Array) -> jax.Array:
        if len(t_EKN) == 1:
            return x_TK * t_EKN[0, :, 0]
        of_token = jnp.repeat(jnp.arange(len(t_EKN)), sizes, total_repeat_length=len(x_TK))
        return x_TK * t_EKN[of_token, :, 0]

    def low_rank(x_TK: Any, left: jax.Array, right: jax.Array) -> jax.Array:
        thin = lax.ragged_dot(x_TK, _full(left, view, [0, 1]), sizes)
        return lax.ragged_dot(thin, jnp.swapaxes(_full(right, view, [0, 2]), 1, 2), sizes)

    flops = 2 * (math.prod(tokens.shape) + math.prod(out))
    summed, kept = frozenset((0, 1)), frozenset((0, 2))
    return _Form(summed, kept, summed, times, low_rank, flops)


def is_plain_ragged(numbers: Any, tokens: Any) -> bool:
    """Whether it is (T, K) x (E, K, N) -> (T, N)."""
    axes = (numbers.dot_dimension_numbers, numbers.lhs_ragged_dimensions)
    plain = ((((1,), (1,)), ((), ())), (0,))
    group = tuple(numbers.rhs_group_dimensions)
    return tokens.ndim == 2 and _tuples(axes) == plain and group == (0,)


def _tuples(x: Any) -> Any:
    return tuple(map(_tuples, x)) if isinstance(x, list | tuple) else x
