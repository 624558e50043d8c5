"""How are gradients rounded to a few bits, so that what rounding takes from one step comes back?
Alistarh et al., "QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding", 2017,
arXiv:1610.02132 (stochastic rounding, section 3.1); Seide et al., "1-Bit Stochastic Gradient
Descent", Interspeech 2014, and Karimireddy et al. 2019, arXiv:1901.09847, algorithm 2 (error
feedback)."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from quantjax.affine import fake_quantize_array, find_scales
from quantjax.formats import IntFormat, Levels
from quantjax.observers import absmax, mse
from quantjax.paths import named_leaves
from quantjax.qat.optional import need_optax
from quantjax.rounding import Rounding, noise
from quantjax.spec import Granularity, QuantSpec


class GradientState(NamedTuple):
    """step: how often gradients were rounded. residual: what rounding took from each and the next
    step adds, float32, or None without error feedback."""

    step: jax.Array
    residual: Any


def quantize_gradients(
    how: QuantSpec | int, *, key: jax.Array | None = None, error_feedback: bool = True
) -> Any:
    """An optax transformation that rounds gradients: u = D(Q(g + e)), e <- g + e - u.

    With error feedback e is what rounding took before: the sum of all that was passed on differs
    from the sum of the gradients by the last e alone, and a gradient below every level is not lost
    but late. e takes a float32 for each parameter. Rounding is to nearest then, as |e| may not grow
    from step to step, and stochastic rounding of a leaf with a large value makes it grow. Without
    feedback e is 0 and rounding stochastic: the mean of u over keys is g.

    how: so many bits, from 1 to 8, with one scale a leaf: that of its largest value; of one bit
    with feedback, +- the mean |g + e|. Or a QuantSpec: its format, observer and rounding, and its
    block as a shape, of which the ends are used for leaves of lower rank; TENSOR or CHANNEL mean
    one scale a leaf. key: of stochastic rounding; the noise of step t is that of `fold_in(key, t)`,
    other for every leaf.

    Values keep dtype and shape; what is not float passes. A gradient of NaN or infinity makes its
    leaf NaN, and would stay in the residual: `optax.apply_if_finite(optax.chain(...), n)` around
    this and the optimizer skips and counts it. Returns a `GradientTransformation`, to stand first
    in a `chain`. Raises ValueError for bits outside 1..8, a QuantSpec with groups, rows, layers or
    an activation, one with which e could grow (stochastic, or levels without zero whose scale is
    not that of least squares), and stochastic rounding without a key; TypeError for another `how`;
    ImportError without optax.

    >>> import optax
    >>> rounded = quantize_gradients(2)  # -1, 0 and 1 times max |g + e|
    >>> optimizer = optax.chain(rounded, optax.sgd(0.1))
    >>> g = {"w": jnp.array([0.375, -1.0, 0.0])}
    >>> u, state = rounded.update(g, rounded.init(g))
    >>> u["w"].tolist(), state.residual["w"].tolist()
    ([0.0, -1.0, 0.0], [0.375, 0.0, 0.0])
    >>> rounded.update(g, state)[0]["w"].tolist()
    [1.0, -1.0, 0.0]
    """
    optax = need_optax("quantize_gradients")
    spec = _spec(how, error_feedback)
    if spec.rounding is Rounding.STOCHASTIC and key is None:
        raise ValueError(
            "quantize_gradients: stochastic rounding needs a key: key=jax.random.key(seed)."
        )

    def init(params: Any) -> GradientState:
        residual = None
        if error_feedback:
            residual = jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), jnp.float32), params)
        return GradientState(jnp.zeros((), jnp.int32), residual)

    def update(updates: Any, state: GradientState, params: Any = None) -> tuple[Any, Any]:
        del params
        named, structure = named_leaves(updates)
        residuals = [None] * len(named)
        if state.residual is not None:
            residuals = structure.flatten_up_to(state.residual)
        step_key = None if key is None else jax.random.fold_in(key, state.step)
        passed: list[Any] = []
        kept: list[Any] = []
        for i, ((name, g), e) in enumerate(zip(named, residuals, strict=True)):
            if not jnp.issubdtype(g.dtype, jnp.floating) or not math.prod(g.shape):
                passed.append(g)
                kept.append(e)
                continue
            whole = g.astype(jnp.float32) if e is None else g.astype(jnp.float32) + e
            leaf_key = None if step_key is None else jax.random.fold_in(step_key, i)
            u = _rounded(whole, spec, leaf_key, name).astype(g.dtype)
            passed.append(u)
            kept.append(None if e is None else whole - u.astype(jnp.float32))
        residual = None if state.residual is None else jax.tree.unflatten(structure, kept)
        return jax.tree.unflatten(structure, passed), GradientState(state.step + 1, residual)

    return optax.GradientTransformation(init, update)


def _spec(how: QuantSpec | int, error_feedback: bool) -> QuantSpec:
    if isinstance(how, QuantSpec):
        _check(how, error_feedback)
        return how
    if not isinstance(how, int) or isinstance(how, bool):
        raise TypeError(f"quantize_gradients: expected bits or a QuantSpec, got {how!r}.")
    format = IntFormat(how, levels=Levels.HALF if how == 1 else Levels.NARROW)
    observer = mse() if how == 1 and error_feedback else absmax()
    rounding = Rounding.NEAREST if error_feedback else Rounding.STOCHASTIC
    return QuantSpec(format=format, block=Granularity.TENSOR, observer=observer, rounding=rounding)


def _check(spec: QuantSpec, error_feedback: bool) -> None:
    if spec.group or spec.stacked or spec.act or spec.block is Granularity.ROW:
        raise ValueError(
            f"quantize_gradients: a gradient has one scale, or one a block whose shape is given; "
            f"no group, rows, layers or activation: got {spec!r}."
        )
    if not error_feedback:
        return
    # Nearest levels with zero among them are never further than zero is; nor is, all in all, the
    # scale of least squares. Else |x - D(Q(x))| may exceed |x|, and the residual grows.
    zero = getattr(spec.format, "has_zero", True)
    if spec.rounding is Rounding.STOCHASTIC or not (zero or spec.observer == mse()):
        raise ValueError(
            f"quantize_gradients: with error feedback the residual could grow without bound under "
            f"{spec!r}: expected rounding to nearest, and levels with zero or observer=mse(). For "
            f"unbiased stochastic rounding give error_feedback=False."
        )


def _rounded(x: jax.Array, spec: QuantSpec, key: jax.Array | None, name: str) -> jax.Array:
    block: tuple[int | None, ...] = (None,) * x.ndim
    if not isinstance(spec.block, Granularity):
        block = spec.block[max(0, len(spec.block) - x.ndim) :]
    spec = dataclasses.replace(spec, block=block)
    uniform = noise(spec.rounding, key, x.shape, name=name)
    return fake_quantize_array(x, find_scales(x, spec), uniform, spec=spec)
