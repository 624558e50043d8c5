"""How does a network train on rounded weights and activations? On leaves that say how they round.

Forward, every product sees D(Q(w)) and D(Q(x)); backward, the gradient passes straight through the
rounding to float parameters, which are what is trained.
Jacob et al. 2018, arXiv:1712.05877, section 3; Bengio et al. 2013, arXiv:1308.3432."""

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quantjax import affine
from quantjax.affine import Scales, scale_values
from quantjax.fake_quantized import FakeQuantized, is_quantized, rounded_value
from quantjax.formats import IntFormat
from quantjax.ops import Backward
from quantjax.paths import named_leaves
from quantjax.qat.estimator import Estimator
from quantjax.sharding import placement
from quantjax.spec import QuantSpec
from quantjax.transform import apply_scales, on_shards, over_leaves


def prepare(
    params: Any,
    policy: Any = None,
    *,
    sites: Sequence[Any] = (),
    like: Any = None,
    estimator: Estimator | None = None,
    backward: Backward | None = None,
    key: jax.Array | None = None,
) -> Any:
    """The same tree with a FakeQuantized for every leaf the policy wants; the rest is kept.

    To be used in the loss: `apply(prepare(params, policy), x)` with `apply = intercept(model)`
    rounds both operands of every product, and the gradient with respect to the float `params` is
    straight-through: 1 where a value lies in a cell of its grid, 0 where it is clipped.

    policy, sites: as in `quantize`; scales are found anew, and no gradient flows through them. Or,
    in place of a policy, `like`: a tree quantized before, whose formats and scales are used, those
    of its static activations with them, as `calibrate` finds them. estimator: another rule than
    straight-through, such as `lsq()`; the tree itself is then what is trained, with what the
    estimator learns in its leaves (see `labels`). backward: how the operands of
    the two gradient products are rounded, see `Backward`; gathered rows of a table have none. key:
    for stochastic rounding, forward or backward; every leaf folds in its path. A new one each step
    is the caller's: `jax.random.fold_in(key, step)`.

    Only `intercept` accepts the tree; `finalize` quantizes it. Works under jit, grad and vmap.
    Raises ValueError, naming the leaf, as `quantize` does, for stochastic rounding without a key,
    and for a static activation without a scale.

    >>> from quantjax import intercept
    >>> params = {"kernel": jnp.array([[1.0, -2.0], [0.6, 0.3]])}
    >>> x = jnp.array([[1.0, 0.4]])
    >>> model = lambda p, x: x @ p["kernel"]
    >>> loss = lambda p: intercept(model)(prepare(p, "w4a4"), x).sum()
    >>> value, slope = jax.jit(jax.value_and_grad(loss))(params)
    >>> round(float(value), 5)  # not -0.64: both sides have 15 levels
    -0.6...
    >>> slope["kernel"][1].tolist()  # x as the product saw it: 3 steps of 1/7
    [0.4285..., 0.4285...]
    """
    if estimator is not None and not isinstance(estimator, Estimator):
        raise TypeError(f"prepare: estimator must be one such as qat.lsq(), got {estimator!r}.")
    if backward is not None and not isinstance(backward, Backward):
        raise TypeError(f"prepare: backward must be a quantjax.qat.Backward, got {backward!r}.")
    weight_key = key if like is None else None
    tree = over_leaves(_leaf, params, policy, like, weight_key, None, sites)
    named, structure = named_leaves(tree)
    leaves = [
        _for_products(name, _with_estimator(name, leaf, estimator), backward, key)
        if isinstance(leaf, FakeQuantized)
        else leaf
        for name, leaf in named
    ]
    return jax.tree.unflatten(structure, leaves)


def finalize(tree: Any) -> Any:
    """The same tree with a QTensor for every FakeQuantized: what was trained, as it is stored.

    `dequantize(finalize(t))` equals the weights of the training forward pass bit for bit, and
    `intercept` runs its products in integers where it can; static activation scales go with it.

    >>> finalize(prepare({"kernel": jnp.ones((2, 2))}, "w4a8"))["kernel"]
    QTensor(int4, shape=(2, 2), block=allx1, dtype=float32)
    """
    return jax.tree.map(
        lambda x: _quantized(x) if isinstance(x, FakeQuantized) else x, tree, is_leaf=is_quantized
    )


def _leaf(x: jax.Array, scales: Scales, uniform: jax.Array | None, *, spec: QuantSpec) -> Any:
    zero = _as_float(scales.zero_point)
    return FakeQuantized(x, scales.scale, zero, scales.codebook, uniform=uniform, spec=spec)


def _with_estimator(name: str, x: FakeQuantized, estimator: Estimator | None) -> FakeQuantized:
    """The leaf with what is learned in place of its scales."""
    if estimator is None:
        return x
    weights, activations = estimator.weights, estimator.activations
    try:
        if weights is not None:
            if x.uniform is not None:
                raise ValueError("an estimator rounds by itself; stochastic rounding is not for it")
            if x.spec.scale_format is not None or not x.spec.symmetric:
                raise ValueError(
                    f"{type(weights).__name__} has float scales of a symmetric grid: expected "
                    f"scale_format=None and symmetric=True, got {x.spec!r}."
                )
            scales = Scales(x.scale, x.zero_point, x.codebook)
            learned = dict(weights.start(x.value, scales, x.spec))
            x = dataclasses.replace(x, scale=None, zero_point=None, codebook=None, learned=learned)
        act = x.spec.act
        if activations is not None and act is not None:
            given = None
            if x.act_scale is not None:
                given = Scales(x.act_scale, x.act_zero_point)
            learned = dict(activations.start(given, act))
            if given is None:  # every layer of a stack begins alike, and learns its own
                learned = {k: jnp.broadcast_to(a, x.layers + a.shape) for k, a in learned.items()}
            x = dataclasses.replace(x, act_scale=None, act_zero_point=None, act_learned=learned)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return dataclasses.replace(x, estimator=estimator)


def _for_products(
    name: str, x: FakeQuantized, backward: Backward | None, key: jax.Array | None
) -> FakeQuantized:
    """The leaf with what its products need beside it."""
    act = x.spec.act
    if act is not None and act.static and x.act_scale is None and x.act_learned is None:
        raise ValueError(
            f"{name}: the scale of its activation is static, but was not found yet: pass the "
            f"policy to quantjax.calibrate with some batches and give the result as like=, or "
            f"give the activation static=False."
        )
    own = None
    if backward is not None and backward.stochastic:
        if key is None:
            raise ValueError(
                f"{name}: stochastic rounding in the backward pass needs a key, a new one each "
                f"step: key=jax.random.fold_in(jax.random.key(seed), step)."
            )
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.wrap_key_data(key)
        own = jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(name.encode())), 1)
        own = jax.random.split(own, x.layers) if x.layers else own
    zero = _as_float(x.act_zero_point)
    return dataclasses.replace(x, act_zero_point=zero, backward=backward, key=own)


def _as_float(zero_point: jax.Array | None) -> jax.Array | None:
    """Codes of zero as floats, so that a tree of leaves has a gradient."""
    return None if zero_point is None else zero_point.astype(jnp.float32)


def _as_code(zero_point: jax.Array | None, spec: QuantSpec | None) -> jax.Array | None:
    if zero_point is None or spec is None or not isinstance(spec.format, IntFormat):
        return zero_point
    return zero_point.astype(spec.format.code_dtype)


def _quantized(x: FakeQuantized) -> Any:
    value, scales = rounded_value(x)
    scales = scales._replace(zero_point=_as_code(scales.zero_point, x.spec))
    how = {"transform": affine.quantize_array, "spec": x.spec}
    q = on_shards(placement(x.value), apply_scales, value, scales, x.uniform, **how)
    act = Scales(x.act_scale, x.act_zero_point)
    own = None if x.estimator is None else x.estimator.activations
    if own is not None and x.spec.act is not None:
        act = own.settled(x.act_learned or {}, x.spec.act) or Scales(None)
        if act.scale is not None:
            act = act._replace(scale=jnp.broadcast_to(scale_values(act.scale), x.layers))
    zero = _as_code(act.zero_point, x.spec.act)
    return dataclasses.replace(
        q,
        dtype=np.dtype(x.dtype),
        act_scale=act.scale,
        act_zero_point=zero,
        act_thresholds=act.thresholds,
    )
