"""How does a training that goes through stages stay one compiled step? The step number chooses.

Delayed rounding, falling bits and frozen normalization are each a loss before and a loss after;
ranges are frozen by the rate at which they learn. All are functions and numbers, to be combined."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from quantjax.affine import Scales
from quantjax.blocks import counts
from quantjax.fake_quantized import FakeQuantized, is_quantized
from quantjax.formats import IntFormat
from quantjax.paths import named_leaves
from quantjax.qtensor import QTensor
from quantjax.spec import QuantSpec


def stages(*parts: tuple[int, Callable[..., Any]]) -> Callable[..., Any]:
    """One function of (step, *args) out of several of (*args): the last whose first step has come.

    parts: (first step, function), in order, from step 0 on. All must return the same shapes and
    dtypes. A traced step compiles all of them once and runs one (both under vmap over steps); a
    Python int takes the function itself. Raises ValueError for parts that do not begin at 0 and
    ascend.

    Rounding that sets in later: `unrounded` gives the tree that products see as floats.

    >>> from quantjax import intercept, qat
    >>> run = intercept(lambda p, x: x @ p["kernel"])
    >>> loss = lambda tree, x: (run(tree, x) ** 2).sum()
    >>> late = stages((0, lambda t, x: loss(unrounded(t), x)), (100, loss))
    >>> tree = qat.prepare({"kernel": jnp.array([[1.0], [0.3]])}, "w2", estimator=qat.lsq())
    >>> x = jnp.array([[0.0, 1.0]])
    >>> [round(float(jax.jit(late)(step, tree, x)), 2) for step in (99, 100)]
    [0.09, 0.11]

    Bits that fall: `stages((0, lambda t, x: loss(with_bits(t, 8), x)), (100, loss))`. Statistics of
    batches that stay as they are, as they drift with rounded weights (Jacob et al. 2018,
    arXiv:1712.05877, section 3.1): a loss of the training pass, then one of the evaluation pass
    that returns the statistics that it was given. Ranges that stay: see `until`.
    """
    starts = [first for first, _ in parts]
    if not parts or starts[0] != 0 or any(b <= a for a, b in zip(starts, starts[1:], strict=False)):
        raise ValueError(f"stages: first steps must ascend from 0, got {starts}.")
    functions = [function for _, function in parts]

    def staged(step: Any, *args: Any) -> Any:
        if isinstance(step, int):
            return functions[sum(step >= first for first in starts[1:])](*args)
        index = sum((jnp.asarray(step >= first, jnp.int32) for first in starts[1:]), jnp.int32(0))
        return jax.lax.switch(index, functions, *args)

    return staged


def until(rate: float | Callable[[Any], Any], step: int) -> Callable[[Any], Any]:
    """A schedule of optax: `rate` before a step, 0 from it on, so that what it trains is frozen.

    rate: a number or a schedule. With it ranges are frozen while weights learn on, of any estimator
    and with any decay that is multiplied by the rate: `{"learned": optax.adam(until(1e-4, 500))}`
    in `optax.partition(..., qat.labels)`.

    >>> [float(until(0.5, 2)(step)) for step in range(4)]
    [0.5, 0.5, 0.0, 0.0]
    """

    def scheduled(count: Any) -> Any:
        now = rate(count) if callable(rate) else rate
        return jnp.where(count < step, now, 0.0)

    return scheduled


def unrounded(tree: Any) -> Any:
    """The tree with the float values of its FakeQuantized leaves in their place, for a loss of the
    network without rounding. Gradients reach the values, and nothing else of the leaves."""
    return jax.tree.map(
        lambda x: x.value if isinstance(x, FakeQuantized) else x, tree, is_leaf=is_quantized
    )


def with_bits(tree: Any, bits: int, act_bits: int | None = None) -> Any:
    """The tree with its FakeQuantized leaves rounded to another number of bits, and, where given,
    the activations that meet them.

    Levels keep their convention, and a step, given or learned by the name of "scale", is stretched
    so that the highest level Q stays where it is: s' = s Q / Q'. Gradients reach the steps of the
    tree. Activations stay as they are if `act_bits` is None. Raises ValueError, naming the leaf,
    for formats that are not integers, zero points, quantized scales, bits that the levels do not
    have, and estimators that do not take them or learn other arrays then.

    >>> from quantjax import qat
    >>> tree = qat.prepare({"kernel": jnp.array([[1.0], [0.3]])}, "w2", estimator=qat.lsq())
    >>> with_bits(tree, 8)["kernel"]
    FakeQuantized(int8h, shape=(2, 1), dtype=float32)
    """
    named, structure = named_leaves(tree)
    leaves = []
    for name, x in named:
        try:
            leaves.append(_of_bits(x, bits, act_bits) if isinstance(x, FakeQuantized) else x)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return jax.tree.unflatten(structure, leaves)


def _of_bits(x: FakeQuantized, bits: int, act_bits: int | None) -> FakeQuantized:
    if x.zero_point is not None or x.act_zero_point is not None:
        raise ValueError("with_bits: a zero point is a code, which other bits do not have.")
    spec, ratio = _spec_of_bits(x.spec, bits)
    own = x.estimator
    if own is not None and own.weights is not None:
        ones = Scales(jnp.ones(counts(x.shape, spec.block_shape), jnp.float32))
        _check_alike(own.weights.start(x.value, ones, spec), x.learned)
    x = dataclasses.replace(
        x, spec=spec, scale=_stretched(x.scale, ratio), learned=_each(x.learned, ratio)
    )
    if act_bits is None or spec.act is None:
        return x
    act, ratio = _spec_of_bits(spec.act, act_bits)
    if own is not None and own.activations is not None:
        ones = Scales(jnp.ones(x.layers, jnp.float32))
        _check_alike(own.activations.start(ones, act), x.act_learned)
    return dataclasses.replace(
        x,
        spec=dataclasses.replace(spec, act=act),
        act_scale=_stretched(x.act_scale, ratio),
        act_learned=_each(x.act_learned, ratio),
    )


def _check_alike(anew: Any, learned: Any) -> None:
    """Raises ValueError if an estimator learns other arrays at other bits. It has seen the format
    by then, and raised where that is not for it."""
    shapes, others = ({k: a.shape for k, a in (d or {}).items()} for d in (learned, anew))
    if set(shapes) != set(others) or any(shapes[k][-1:] != others[k][-1:] for k in shapes):
        raise ValueError(f"with_bits: other bits learn arrays of shapes {others}, not {shapes}.")


def _spec_of_bits(spec: QuantSpec, bits: int) -> tuple[QuantSpec, float]:
    """The same spec with other bits, and by how much its step grows."""
    old = spec.format
    if not isinstance(old, IntFormat):
        raise ValueError(f"with_bits: expected an integer format, got {old}.")
    new = dataclasses.replace(old, bits=bits)
    return dataclasses.replace(spec, format=new), old.max_level / new.max_level


def _stretched(scale: Any, ratio: float) -> Any:
    if isinstance(scale, QTensor):
        raise ValueError("with_bits: its scale is quantized, and can not be stretched.")
    return None if scale is None else scale * jnp.float32(ratio)


def _each(learned: Any, ratio: float) -> Any:
    if learned is None:
        return None
    return {name: _stretched(a, ratio) if name == "scale" else a for name, a in learned.items()}
