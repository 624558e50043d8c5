"""What went wrong in a traced model, in words of its parameters? JAX's own errors name shapes only.

Arguments are checked before the trace; an error of the model keeps its type and text, and gets a
note that says what `intercept` has to do with it."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from quantjax.blocks import counts
from quantjax.interpret.jax_compat import Literal, open_jaxpr
from quantjax.packing import packed_length
from quantjax.qtensor import QTensor

Named = Sequence[tuple[str | None, Any]]  # (path or None, leaf) of every array
SHOWN = 8

_BRANCH = """\
intercept: the function is traced, as jax.jit does, so the values of arrays are not known in it. \
Decide with lax.cond or jnp.where; or pass what decides as a Python bool, number or string, not as \
an array: those are static here. Under jax.jit, bind them first: \
jax.jit(intercept(functools.partial(apply, flag=True)))."""
_CLOSED = """\
intercept: the function closes over a QTensor. Pass quantized parameters as its first argument: \
intercept(lambda params, x: model(params, x))(qparams, x)."""


def check_leaves(named: Named) -> None:
    """Raises ValueError, naming the leaf, for a deleted buffer, or for a quantized array whose
    parts do not belong together."""
    for name, leaf in named:
        for array in jax.tree.leaves(leaf):
            held = isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer)
            if held and array.is_deleted():
                raise ValueError(
                    f"{name or 'an argument'}: its buffer was donated or deleted. Keep the tree "
                    f"that the donating call returned, or do not donate this argument."
                )
        if isinstance(leaf, QTensor):
            _check_parts(name or "an argument", leaf)


def _check_parts(name: str, q: QTensor) -> None:
    if q.packed is not None:
        axis, length = q.packed
        bytes_ = packed_length(length, q.format.bits)
        if q.qvalue.shape[axis] != bytes_:
            raise ValueError(
                f"{name}: {length} codes of {q.format.bits} bits along axis {axis} take {bytes_} "
                f"bytes, its codes have shape {q.qvalue.shape}."
            )
    if len(q.block) > q.ndim:
        raise ValueError(f"{name}: a block of {q.block} does not fit an array of shape {q.shape}.")
    wanted = counts(q.shape, q.block)
    for part in ("scale", "zero_point"):
        own = getattr(q, part)
        if own is not None and tuple(own.shape) != wanted:
            raise ValueError(
                f"{name}: expected a {part} of shape {wanted}, one per block of {q.block} on "
                f"{q.shape}, got {tuple(own.shape)}."
            )
        if isinstance(own, QTensor):
            _check_parts(f"{name} ({part})", own)


@contextlib.contextmanager
def explained(named: Named) -> Iterator[None]:
    """Adds to an error of the model inside what its parameters have to do with it."""
    try:
        yield
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
        error.add_note(_BRANCH)
        raise
    except Exception as error:
        if "QTensor" in str(error):
            error.add_note(_CLOSED)
        elif note := _shapes(str(error), named):
            error.add_note(note)
        raise


def _shapes(message: str, named: Named) -> str:
    """The shapes of the quantized parameters; first those that the message mentions."""
    shapes = [(name, q.shape) for name, q in named if isinstance(q, QTensor)]
    met = [(name, shape) for name, shape in shapes if str(shape) in message]
    shown = met or shapes
    if not shown:
        return ""
    lines = [f"  {name}: {shape}" for name, shape in shown[:SHOWN]]
    if len(shown) > SHOWN:
        lines.append(f"  and {len(shown) - SHOWN} more")
    return "\n".join(
        [
            "intercept: the function fails by itself, or on the shapes of its quantized "
            "parameters. It sees these arrays; were they quantized for this model?",
            *lines,
        ]
    )


def check_used(jaxpr: Any, names: list[str | None]) -> None:
    """Raises ValueError if the function reads no quantized parameter, but arrays of its own."""
    own = [c for c in jaxpr.consts if np.ndim(c) > 1]
    jaxpr, _ = open_jaxpr(jaxpr)
    uses = (*(v for eqn in jaxpr.eqns for v in eqn.invars), *jaxpr.outvars)
    read = {v for v in uses if not isinstance(v, Literal)}
    quantized = [(n, v) for n, v in zip(names, jaxpr.invars, strict=True) if n is not None]
    if own and quantized and not any(v in read for _, v in quantized):
        raise ValueError(
            f"intercept: the function uses none of its {len(quantized)} quantized parameters "
            f"({quantized[0][0]}, ...). If it closes over them, pass them as its first argument: "
            f"intercept(lambda params, x: model(params, x))(qparams, x)."
        )
