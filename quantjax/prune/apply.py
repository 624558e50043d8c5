"""What does a tree look like without its pruned weights? They are zero, to the last bit, whether it
holds floats, floats that products see rounded, or codes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from quantjax import affine
from quantjax.fake_quantized import FakeQuantized, fake_array, is_quantized
from quantjax.formats import ExponentFormat, is_learned
from quantjax.packing import pack, unpack
from quantjax.paths import named_leaves
from quantjax.prune.select import by_name, is_known
from quantjax.qtensor import QTensor
from quantjax.spec import QuantSpec
from quantjax.transform import dequantize


def apply(tree: Any, masks: Any) -> Any:
    """The same tree, with exact zeros where a mask is False.

    tree: of float arrays, of FakeQuantized leaves (`qat.prepare`), of QTensors, or of all of them;
    masks: a tree with its paths, booleans of the leaves' shapes, None or nothing where a leaf is
    whole. A QTensor gets the code of zero; its scales stay. Works under jit and grad: no gradient
    reaches a pruned weight.

    Zeros that were set before `quantize` or `prepare` stay zeros in every format that has one, so
    this is needed again only after what moves weights: a method of `calibrate`, an optimizer
    without `masked`. It also checks: raises ValueError, naming the leaf and its format, where zero
    is no level (half-integer levels, codebooks without 0, zero points between codes) or something
    is added to it (low-rank factors), and for a mask that does not fit its leaf. Under jit a zero
    point is taken for a code; learned codebooks and leaves with an estimator raise, as what they
    make of zero can not be looked at: use `masked`, and ask once outside.

    >>> from quantjax import quantize, dequantize
    >>> q = quantize({"w": jnp.array([[1.0, -2.0]])}, "w4")
    >>> dequantize(apply(q, {"w": jnp.array([[True, False]])}))["w"].tolist()
    [[1.0, 0.0]]
    """
    found = by_name(tree, masks)
    named, structure = named_leaves(tree)
    leaves = [pruned(name, x, found[name]) if name in found else x for name, x in named]
    return jax.tree.unflatten(structure, leaves)


def pruned(name: str, x: Any, mask: Bool[Array, "*n"]) -> Any:
    """One leaf with zeros where its mask is False. `name`: for what it raises."""
    if not is_quantized(x):
        x = jnp.asarray(x)
        return jnp.where(mask, x, jnp.zeros((), x.dtype))
    why = _without_zero(x)
    if why:
        raise ValueError(
            f"{name}: a mask needs an exact zero, and {x.format} has none here: {why}."
        )
    if isinstance(x, FakeQuantized):
        new: Any = dataclasses.replace(x, value=jnp.where(mask, x.value, 0).astype(x.dtype))
    else:
        new = _with_zero_codes(x, mask)
    if all(map(is_known, jax.tree.leaves((new, mask)))):
        values = fake_array(new) if isinstance(new, FakeQuantized) else dequantize(new)
        if np.any(np.asarray(values)[~np.asarray(mask)] != 0):
            raise ValueError(
                f"{name}: a mask needs an exact zero, and {x.format} gives another value for it "
                f"here: an estimator moves it, a scale is not finite, or a zero point lies beyond "
                f"the codes."
            )
    return new


def _without_zero(x: Any) -> str:
    """Why zero is no value of a quantized leaf; empty if it is one."""
    if isinstance(x.format, ExponentFormat):
        return "it holds bare scales"
    if not is_learned(x.format) and not getattr(x.format, "has_zero", True):
        return "0 lies between its levels"
    if isinstance(x, FakeQuantized) and x.estimator is not None and x.estimator.weights is not None:
        # Some shift the weights before they round; then the values themselves tell.
        known = all(map(is_known, jax.tree.leaves(x)))
        return "" if known else "what its estimator makes of 0 is not known under jit"
    if is_learned(x.format):
        if not is_known(x.codebook):
            return "its learned levels are not known under jit"
        return "" if (np.asarray(x.codebook) == 0).any(-1).all() else "no learned level is 0"
    if isinstance(x, QTensor) and x.left is not None:
        return "low-rank factors are added to every weight"
    zero = x.zero_point
    if zero is not None and is_known(zero) and np.any(np.asarray(zero) != np.round(zero)):
        return "its zero points lie between codes"
    return ""


@jax.jit
def _with_zero_codes(q: QTensor, mask: Bool[Array, "*n"]) -> QTensor:
    """The same scales, and the code of zero where the mask is False."""
    assert not isinstance(q.format, ExponentFormat)
    spec = QuantSpec(format=q.format, block=q.block, symmetric=q.zero_point is None)
    zero = affine.quantize_array(jnp.zeros(q.shape, q.dtype), affine.scales_of(q), spec=spec)
    codes = jnp.where(mask, _unpacked(q), _unpacked(zero))
    if q.packed is not None:
        codes = pack(codes, q.format.bits, q.packed[0])
    return dataclasses.replace(q, qvalue=codes)


def _unpacked(q: QTensor) -> jax.Array:
    """The bytes of the codes, one each, as they are stored."""
    if q.packed is None:
        return q.qvalue
    axis, length = q.packed
    return unpack(q.qvalue, q.format.bits, length, axis)
