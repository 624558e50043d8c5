"""How does a frozen tree run with its adapters, and how do they become part of it?
Hu et al. 2021, arXiv:2106.09685, section 4.1; Dettmers et al. 2023, arXiv:2305.14314, eq. 5."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from quantjax.affine import low_rank_values
from quantjax.lora.adapters import Adapter, quantized_leaves
from quantjax.paths import named_leaves, nearest
from quantjax.policy import Policy, Resolution, Resolved, preset
from quantjax.qtensor import QTensor
from quantjax.transform import dequantize, quantize


def attach(qparams: Any, adapters: Mapping[str, Adapter]) -> Any:
    """The same tree, its adapted leaves with factors: x @ W_q + (alpha / r) (x @ a) @ b.

    To be used in the loss, `intercept(model)(attach(qparams, adapters), x)`, differentiated with
    respect to the adapters: codes and scales are constants, and the gradient costs thin products
    alone. Activations that a leaf rounds (`QuantSpec.act`) are rounded for its codes, not for the
    adapter. Factors that a leaf has already, as from `ptq.low_rank`, stay, and the ranks add up.

    Raises ValueError, naming the leaf, for a path that is not there or not quantized, and for
    factors that do not fit its shape.

    >>> from quantjax import intercept, lora, quantize
    >>> q = quantize({"kernel": jnp.array([[1.0, -2.0], [0.5, 4.0]])}, "w8")
    >>> adapters = lora.init(q, "kernel", 1, jax.random.key(0))
    >>> model = lambda p, x: x @ p["kernel"]
    >>> loss = lambda adapters: intercept(model)(lora.attach(q, adapters), jnp.ones((1, 2))).sum()
    >>> jax.tree.map(jnp.shape, jax.grad(loss)(adapters))["kernel"].b
    (1, 2, 1)
    """
    leaves = _checked(qparams, adapters, "lora.attach")
    new = {name: _with(leaves[name], adapter) for name, adapter in adapters.items()}
    return _replaced(qparams, new)


def merge(
    qparams: Any, adapters: Mapping[str, Adapter], policy: Policy | Resolved | str | None = None
) -> Any:
    """Adapters made part of their parameters: W = D(W_q) + (alpha / r) a b, the rest as it is.

    Without a policy the adapted leaves become float arrays, those of
    `dequantize(attach(qparams, adapters))` to the last bit; with one they are quantized by it, with
    scales found anew. That rounds the term of the adapters too: a tree that is to keep what was
    trained stays attached, and is saved so. Raises ValueError as `attach` and `quantize` do.

    >>> from quantjax import lora, quantize
    >>> q = quantize({"kernel": jnp.array([[1.0, -2.0], [0.5, 4.0]])}, "w8")
    >>> adapters = lora.init(q, "kernel", 1, jax.random.key(0))
    >>> lora.merge(q, adapters)["kernel"].dtype, lora.merge(q, adapters, "w8")["kernel"]
    (dtype('float32'), QTensor(int8, shape=(2, 2), block=allx1, dtype=float32))
    """
    leaves = _checked(qparams, adapters, "lora.merge")
    attached = {name: _with(leaves[name], adapter) for name, adapter in adapters.items()}
    floats = _replaced(qparams, {n: dequantize(q) for n, q in attached.items()})
    if policy is None:
        return floats
    policy = preset(policy) if isinstance(policy, str) else policy
    decided = [
        (name, r if name in adapters else Resolution(None, r.matched, "not adapted"))
        for name, r in policy.explain(floats).leaves
    ]
    return quantize(floats, Resolved(tuple(decided)))


def unmerge(params: Any, adapters: Mapping[str, Adapter]) -> Any:
    """The float tree without the adapters that `merge` made part of it: W - (alpha / r) a b.

    As far as floats go: a sum is taken back up to its rounding, 2^-24 of the larger term. Raises
    ValueError, naming the leaf, for a path that is not there, a shape that does not fit, and a
    quantized leaf: its codes do not tell what was added before they were rounded.

    >>> from quantjax import lora, quantize
    >>> q = quantize({"kernel": jnp.array([[1.0, -2.0], [0.5, 4.0]])}, "w8")
    >>> adapters = lora.init(q, "kernel", 1, jax.random.key(0))
    >>> lora.unmerge(lora.merge(q, adapters), adapters)["kernel"].tolist()
    [[1.0, -2.015748...], [0.503937..., 4.0]]
    """
    leaves = dict(named_leaves(params)[0])
    new = {}
    for name, adapter in adapters.items():
        w = _there(leaves, name, "lora.unmerge")
        if isinstance(w, QTensor) or not jnp.issubdtype(w.dtype, jnp.floating):
            raise ValueError(
                f"{name}: lora.unmerge expects a float array, got {w!r}. Keep the tree that the "
                f"adapters were attached to."
            )
        _check_fits(name, tuple(w.shape), adapter)
        wide = jnp.asarray(w, jnp.float32) - low_rank_values(adapter.a, _scaled(adapter))
        new[name] = wide.astype(w.dtype)
    return _replaced(params, new)


def _with(q: QTensor, adapter: Adapter) -> QTensor:
    left, right = adapter.a, _scaled(adapter)
    if q.left is not None and q.right is not None:
        left, right = _joined(q.left, left), _joined(q.right, right)
    return dataclasses.replace(q, left=left, right=right)


def _scaled(adapter: Adapter) -> jax.Array:
    return adapter.b * jnp.asarray(adapter.scale, adapter.b.dtype)


def _joined(old: jax.Array, new: jax.Array) -> jax.Array:
    """Both, one behind the other along the rank."""
    shape = jnp.broadcast_shapes(old.shape[:-1], new.shape[:-1])
    parts = [jnp.broadcast_to(x, (*shape, x.shape[-1])) for x in (old, new)]
    return jnp.concatenate(parts, -1)


def _checked(tree: Any, adapters: Mapping[str, Adapter], who: str) -> dict[str, QTensor]:
    """The quantized leaves, if there is one for every adapter."""
    leaves = dict(named_leaves(tree)[0])
    for name, adapter in adapters.items():
        q = _there(leaves, name, who)
        if not isinstance(q, QTensor):
            raise ValueError(f"{name}: {who} expects a QTensor, got {q!r}.")
        _check_fits(name, q.shape, adapter)
    return quantized_leaves(tree, who)


def _there(leaves: dict[str, Any], name: str, who: str) -> Any:
    if name not in leaves:
        raise ValueError(f"{name}: {who}: no such parameter. Nearest: {nearest(name, leaves)}.")
    return leaves[name]


def _check_fits(name: str, shape: tuple[int, ...], adapter: Adapter) -> None:
    a, b = tuple(adapter.a.shape), tuple(adapter.b.shape)
    ranks = len(a) == len(b) == len(shape) + 1 and a[-1] == b[-1]
    if not ranks or any({m, n} - {1, s} for m, n, s in zip(a, b, shape, strict=False)):
        raise ValueError(f"{name}: an adapter of {a} and {b} does not fit shape {shape}.")


def _replaced(tree: Any, new: Mapping[str, Any]) -> Any:
    named, structure = named_leaves(tree)
    return jax.tree.unflatten(structure, [new.get(name, leaf) for name, leaf in named])
