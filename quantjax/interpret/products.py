"""How does each kind of product use a quantized parameter?"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as p

from quantjax.affine import dequantize_array
from quantjax.blocks import sizes
from quantjax.interpret import jax_compat as compat
from quantjax.interpret.beside import Taken, is_plain_ragged, taken_apart
from quantjax.interpret.gradients import trained_product
from quantjax.interpret.param import Param, as_qtensor, beside_codes
from quantjax.interpret.record import Place, Site, product
from quantjax.interpret.rounded import Rounded, keeps_floats, rounded_activation
from quantjax.ops import (
    ConvParams,
    DimensionNumbers,
    Lowering,
    Pair,
    Plan,
    fits_weight_only,
    plan_conv,
    plan_dot,
    plan_ragged_dot,
    quantized_conv,
    quantized_dot,
    quantized_ragged_dot,
    weight_only_dot,
)
from quantjax.qtensor import QTensor

DOT, CONV, GATHER = p.dot_general_p.name, p.conv_general_dilated_p.name, p.gather_p.name
RAGGED_DOT = "ragged_dot_general"
PRODUCTS = frozenset({DOT, CONV, RAGGED_DOT})
DEQUANTIZED = "float, dequantized here"
FAKE = "float, fake-quantized"
FROM_CODES = "on CPU from codes where that is faster"


# Compiled on its own: products of equal shapes, as the layers of a model have, are traced once, and
# outside jit a product is one program.
_compiled_dot = jax.jit(quantized_dot, static_argnums=(3, 4))


def _originals(x: Param, dims: Sequence[int]) -> tuple[int, ...]:
    """Axes of the view as axes of the leaf."""
    return tuple(a for d in dims for a in x.axes[d])


def _note_site(
    machine: Any,
    eqn: Any,
    x: Param,
    other: Any,
    place: Place,
    *,
    contracting: Sequence[int],
    batch: Sequence[int],
    flops: int,
    groups: int = 1,
    lowering: str = DEQUANTIZED,
    act: Rounded | None = None,
    term: int = 0,
) -> None:
    summed, shared = _originals(x, contracting), _originals(x, batch)
    machine.record.site(
        place,
        Site(
            path=x.path,
            primitive=eqn.primitive.name,
            module=place.module,
            contracting=summed,
            batch=shared,
            output=tuple(a for a in range(x.value.ndim) if a not in (*summed, *shared)),
            param_shape=tuple(x.value.shape),
            input_shape=tuple(other.shape),
            output_shape=tuple(eqn.outvars[0].aval.shape),
            flops=flops * place.calls,
            term_flops=term * place.calls,
            calls=place.calls,
            groups=groups,
            layers=x.layers,
            format=_format(x),
            beside=_beside(x),
            act="" if act is None else str(act),
            lowering=_lowering(x, lowering),
        ),
    )


def _format(x: Param) -> str:
    if isinstance(x.value, QTensor):
        return str(x.value.format)
    return str(x.value.dtype if x.trained is None else x.trained.format)


def _beside(x: Param) -> str:
    """What the leaf holds beside its codes."""
    q = x.value
    if not isinstance(q, QTensor):
        return ""
    low_rank = f"rank {q.rank}" if q.rank else ""
    return ", ".join(filter(None, ("" if q.input_scale is None else "input scale", low_rank)))


def _lowering(x: Param, lowering: str) -> str:
    if x.quantized:
        return lowering
    if x.trained is None:
        return "float"
    backward = x.trained.backward
    return FAKE if backward is None else f"{FAKE}; gradients: {backward}"


def _bound(eqn: Any, inputs: Sequence[Any]) -> list[Any]:
    """The original operation on float arrays. A product is where a parameter is meant to be
    read, so nothing is remarked."""
    return compat.rebind(eqn, [x.array() if isinstance(x, Param) else x for x in inputs])


def dot(machine: Any, eqn: Any, inputs: Sequence[Any], place: Place) -> list[Any]:
    """dot_general: in integers where both sides are, from the codes where that is faster, else
    on dequantized weights."""
    (summed, shared), out = eqn.params["dimension_numbers"], eqn.outvars[0].aval
    lowering, act, result, term = DEQUANTIZED, None, None, 0
    used = [i for i, x in enumerate(inputs) if isinstance(x, Param)]
    if len(used) == 1 and inputs[used[0]].quantized:
        act = rounded_activation(eqn, inputs[used[0]])
        taken = taken_apart(eqn, inputs, used[0])
        lowering, result = _quantized_dot(eqn, inputs, used[0], taken, act)
        if result is not None:
            lowering, term = f"{lowering}{taken.note}", taken.flops
            result = taken.finish(result)
    elif len(used) == 1 and inputs[used[0]].trained is not None:
        act = rounded_activation(eqn, inputs[used[0]])
        result = _trained(eqn, inputs, used[0], act, summed[1 - used[0]])
    for i in used:
        _note_site(
            machine, eqn, inputs[i], inputs[1 - i], place,
            contracting=summed[i], batch=shared[i], lowering=lowering, act=act, term=term,
            flops=2 * math.prod(out.shape) * product(inputs[i].shape, tuple(summed[i])),
        )  # fmt: skip
    return _bound(eqn, inputs) if result is None else [result]


def _trained(
    eqn: Any, inputs: Sequence[Any], side: int, act: Rounded | None, summed: Sequence[int]
) -> jax.Array:
    """The product of a fake-quantized parameter, at `side`, in floats with both sides rounded."""
    arrays = [x.array() if isinstance(x, Param) else x for x in inputs]
    if act is not None:
        arrays[1 - side] = act.fake(arrays[1 - side], summed)
    return trained_product(eqn, arrays, side, inputs[side].trained)


def _quantized_dot(
    eqn: Any, inputs: Sequence[Any], side: int, taken: Taken, act: Rounded | None
) -> tuple[str, jax.Array | None]:
    """How the product of a quantized parameter and an activation is computed, and the product of
    what was `taken` of them; None where it is the original one on dequantized weights."""
    summed, shared = eqn.params["dimension_numbers"]
    w: Any = taken.leaf
    x, numbers = _in_leaf_axes(taken.activation, w, side, summed, shared)
    q, out = w.value, eqn.outvars[0].aval
    if act is not None:
        used = (*numbers[0][0], *numbers[1][0])
        rows = math.prod(n for a, n in enumerate(x.shape) if a not in used)
        plan = plan_dot(q, act.spec, numbers, rows)
        lowering = str(plan)
        if plan.lowering is not Lowering.FLOAT:
            y = _compiled_dot(x, q, act.given, act.spec, numbers)
            return lowering, _in_view_axes(y, w, side, summed, shared, out)
    else:
        lowering = DEQUANTIZED
    if not keeps_floats(eqn) and not fits_weight_only(x, q, numbers):
        y = weight_only_dot(x if act is None else act.fake(x, numbers[0][0]), q, numbers)
        return f"{lowering}; {FROM_CODES}", _in_view_axes(y, w, side, summed, shared, out)
    if act is None:
        return lowering, _beside_floats(eqn, inputs, side, taken)
    operands = [w.array(), w.array()]
    operands[1 - side] = _faked(act, taken, inputs[1 - side], summed[1 - side])
    return lowering, compat.rebind(eqn, operands)[0]


def _faked(act: Rounded, taken: Taken, x: Any, summed: Sequence[int]) -> jax.Array:
    """The activation as the product sees it, in floats of the dtype that it had."""
    return act.fake(taken.activation, summed).astype(x.dtype)


def _beside_floats(eqn: Any, inputs: Sequence[Any], side: int, taken: Taken) -> jax.Array | None:
    """The float product of a parameter without its low-rank term, where that is `taken` apart; None
    where there is none, or the model asks for the highest precision.

    To make one array of both would be as exact; but then the gradient of thin factors takes a
    product that makes one of the whole array."""
    if taken.term is None or keeps_floats(eqn):
        return None
    whole = inputs[side]
    operands = list(inputs)
    without = dataclasses.replace(whole.value, left=None, right=None)
    operands[side] = dataclasses.replace(whole, value=without).array()
    return compat.rebind(eqn, operands)[0]


def _in_leaf_axes(
    x: jax.Array, w: Param, side: int, summed: Any, shared: Any
) -> tuple[jax.Array, DimensionNumbers]:
    """x and dimension numbers for a product with the leaf as it is stored: where the view merged
    axes of the leaf, those of x that meet them are split."""
    pairs = [*zip(summed[1 - side], summed[side]), *zip(shared[1 - side], shared[side])]  # noqa: B905
    met = {a: w.axes[d] for a, d in pairs}
    shape: list[int] = []
    places = {}
    for a, n in enumerate(x.shape):
        lengths = [w.value.shape[i] for i in met[a]] if a in met else [n]
        places[a] = tuple(range(len(shape), len(shape) + len(lengths)))
        shape += lengths
    x = x if x.shape == tuple(shape) else x.reshape(shape)

    def of(dims: Any) -> Pair:
        in_x = tuple(i for a in dims[1 - side] for i in places[a])
        return in_x, _originals(w, dims[side])

    return x, (of(summed), of(shared))


def _in_view_axes(
    y: jax.Array, w: Param, side: int, summed: Any, shared: Any, out: Any
) -> jax.Array:
    """The product with the leaf, (batch, rows, free axes of the leaf), as the model has it: `out`
    gives shape and dtype."""
    dims = (*summed[side], *shared[side])
    used, batch = _originals(w, dims), _originals(w, shared[side])
    stored = [a for a in range(w.value.ndim) if a not in used]
    held = list(_originals(w, [d for d in range(len(w.axes)) if d not in dims]))
    held += [a for a in stored if a not in held]  # of length one, dropped by the view
    lead = y.ndim - len(stored)
    free = [lead + stored.index(a) for a in held]
    rows = list(range(len(batch), lead))
    y = jnp.transpose(y, [*range(len(batch)), *(free + rows if side == 0 else rows + free)])
    return y.reshape(out.shape).astype(out.dtype)


def _floats(eqn: Any, inputs: Sequence[Any]) -> tuple[str, jax.Array | None, int]:
    """Of a float activation and a quantized parameter, the second operand: how their product is
    computed, the product, None where it is the original one, and the flops of the term beside."""
    taken = taken_apart(eqn, inputs, 1)
    result = _beside_floats(eqn, inputs, 1, taken)
    if result is None:
        return DEQUANTIZED, None, 0
    return f"{DEQUANTIZED}{taken.note}", taken.finish(result), taken.flops


def convolution(machine: Any, eqn: Any, inputs: Sequence[Any], place: Place) -> list[Any] | None:
    """Any convolution: in integers where both sides are and it pays, else on dequantized weights;
    the image is rounded with one scale an example, or one in all."""
    image, kernel = inputs
    if isinstance(image, Param) or not isinstance(kernel, Param):
        return None
    params = ConvParams(**{name: eqn.params[name] for name in ConvParams._fields})
    numbers, out = params.dimension_numbers, eqn.outvars[0].aval
    summed = numbers.rhs_spec[1:]  # of (output, input, *window)
    act, lowering, result, term = rounded_activation(eqn, kernel), DEQUANTIZED, None, 0
    if kernel.trained is not None:
        result = _trained(eqn, inputs, 1, act, params.summed)
    elif act is None and kernel.quantized:
        lowering, result, term = _floats(eqn, inputs)
    elif act is not None:
        taken = taken_apart(eqn, inputs, 1)
        q, x = as_qtensor(taken.leaf), taken.activation
        plan = Plan(Lowering.FLOAT, "a view that merges axes")
        if q is not None:
            plan = plan_conv(q, act.spec, params, image.shape)
        lowering = f"{str(plan).replace('product', 'convolution')}{taken.note}"
        if plan.lowering is Lowering.FLOAT:
            rounded = _faked(act, taken, image, params.summed)
            result = compat.rebind(eqn, [rounded, taken.leaf.array()])[0]
        else:
            result = quantized_conv(x, q, act.given, act.spec, params).astype(out.dtype)
        result, term = taken.finish(result), taken.flops
    flops = 2 * math.prod(out.shape) * product(kernel.shape, tuple(summed))
    _note_site(
        machine, eqn, kernel, image, place,
        contracting=summed, batch=(), flops=flops, lowering=lowering, act=act, term=term,
        groups=params.feature_group_count * params.batch_group_count,
    )  # fmt: skip
    return _bound(eqn, inputs) if result is None else [result]


def gather(machine: Any, eqn: Any, inputs: Sequence[Any], place: Place) -> list[Any] | None:
    """Rows of a table: the axes that are indexed one entry at a time are its batch."""
    table, index = inputs
    if not isinstance(table, Param) or isinstance(index, Param):
        return None
    rows = _rows(eqn, table, index)
    lowering = DEQUANTIZED if rows is None else "rows dequantized"
    batch = eqn.params["dimension_numbers"].collapsed_slice_dims
    _note_site(
        machine, eqn, table, index, place,
        contracting=(), batch=batch, flops=0, lowering=lowering,
    )  # fmt: skip
    return _bound(eqn, inputs) if rows is None else [rows]


def _rows(eqn: Any, table: Param, index: Any) -> jax.Array | None:
    """Whole rows of a quantized table, gathered as codes; None where scales span rows, or where
    something else is gathered. Out of bounds the scale is NaN wherever the value would be."""
    q, params = as_qtensor(table), eqn.params
    if q is None or q.codebook is not None or not isinstance(q.scale, jax.Array):
        return None
    dims, rank, out = params["dimension_numbers"], q.ndim, eqn.outvars[0].aval.ndim
    whole = params["slice_sizes"] == (1, *q.shape[1:]) and dims.collapsed_slice_dims == (0,)
    trailing = tuple(dims.offset_dims) == tuple(range(out - rank + 1, out))
    alone = len(q.block) < rank or sizes(q.shape, q.block)[0] == 1
    if not (whole and trailing and alone) or (q.packed is not None and q.packed[0] == -rank):
        return None

    def rows(child: jax.Array) -> jax.Array:
        offsets = tuple(range(out - rank + 1, out - rank + child.ndim))
        own: dict[str, Any] = {
            "slice_sizes": (1, *child.shape[1:]),
            "dimension_numbers": dims._replace(offset_dims=offsets),
        }
        if not jax.numpy.issubdtype(child.dtype, np.floating):
            own["fill_value"] = 0  # NaN, which the scale has there, is no integer
        return eqn.primitive.bind(child, index, **{**params, **own})

    def of_each(child: jax.Array) -> jax.Array:
        """Rows of what may be the same for all rows."""
        if child.shape[0] != 1 or q.shape[0] == 1:
            return rows(child)
        return child.reshape(*(1,) * (out - rank + 1), *child.shape[1:])

    zero = None if q.zero_point is None else rows(q.zero_point)
    found = dataclasses.replace(
        beside_codes(q, of_each),
        qvalue=rows(q.qvalue),
        scale=rows(q.scale),
        zero_point=zero,
        block=q.block[-(rank - 1) :],
    )
    return dequantize_array(found)


def ragged_dot(machine: Any, eqn: Any, inputs: Sequence[Any], place: Place) -> list[Any] | None:
    """Tokens sorted by expert, times the experts' matrices."""
    tokens, experts, *rest = inputs
    if not isinstance(experts, Param) or any(isinstance(x, Param) for x in (tokens, *rest)):
        return None
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (summed_tokens, summed), (_, shared) = numbers.dot_dimension_numbers
    act, lowering, result, term = rounded_activation(eqn, experts), DEQUANTIZED, None, 0
    if experts.trained is not None:
        result = _trained(eqn, inputs, 1, act, summed_tokens)
    elif act is None and experts.quantized:
        lowering, result, term = _floats(eqn, inputs)
    elif act is not None:
        taken = taken_apart(eqn, inputs, 1)
        q, x = as_qtensor(taken.leaf), taken.activation
        plan = Plan(Lowering.FLOAT, "other axes than (T, K) and (E, K, N)")
        if q is not None and len(rest) == 1 and is_plain_ragged(numbers, tokens):
            plan = plan_ragged_dot(q, act.spec)
        lowering = f"{plan}{taken.note}"
        if plan.lowering is Lowering.FLOAT:
            rounded = _faked(act, taken, tokens, summed_tokens)
            result = compat.rebind(eqn, [rounded, taken.leaf.array(), *rest])[0]
        else:
            y = quantized_ragged_dot(x, q, rest[0], act.given, act.spec)
            result = y.astype(eqn.outvars[0].aval.dtype)
        result, term = taken.finish(result), taken.flops
    flops = 2 * math.prod(eqn.outvars[0].aval.shape) * product(experts.shape, tuple(summed))
    _note_site(
        machine, eqn, experts, tokens, place,
        contracting=summed, batch=(*shared, *numbers.rhs_group_dimensions), flops=flops,
        lowering=lowering, act=act, term=term,
    )  # fmt: skip
    return _bound(eqn, inputs) if result is None else [result]
