"""Which parameters get an adapter, of which shape, and how does it start?
Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv:2106.09685; over
quantized weights: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023,
arXiv:2305.14314."""

import dataclasses
import math
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from quantjax.axes import FIRST
from quantjax.paths import compile_pattern, named_leaves, nearest
from quantjax.policy import Policy, Resolved
from quantjax.ptq.matrix import matrix_form
from quantjax.qtensor import QTensor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """The two factors of one parameter's term, scale * sum_r a[..., r] * b[..., r].

    a, b: of the parameter's rank and one axis more, the rank r, at the end; `a` has length one
    along the outputs, `b` along the axes summed over, and both are whole along layers and experts.
    scale: alpha / r, static.
    """

    a: jax.Array
    b: jax.Array
    scale: float = dataclasses.field(metadata=dict(static=True), kw_only=True)

    @property
    def rank(self) -> int:
        """The rank r of the term."""
        return self.a.shape[-1]


def init(
    qparams: Any,
    where: str | Sequence[str] | Policy | Resolved,
    rank: int,
    key: jax.Array,
    *,
    alpha: float | None = None,
    sites: Sequence[Any] = (),
) -> dict[str, Adapter]:
    """An adapter for every quantized parameter wanted, by its path: W + (alpha / rank) a b.

    where: a pattern of paths, or several, or a policy, which wants the leaves it would quantize.
    alpha: of the scale alpha / rank; by default the rank, so that the scale is 1. sites: what
    `quantjax.sites` found, which says which axes are summed over and which are layers or experts
    with an adapter each; without, names and the leading axes that a leaf's block leaves out do, as
    in `quantize`. key: every adapter folds in its path.

    a is normal with variance 1 / inputs, b zero: at first the function is that of `qparams`. An
    adapter takes rank * (inputs + outputs) float32 numbers, and so do gradients and an optimizer's
    moments, as these alone are trained.

    Raises ValueError for a pattern that matches no quantized parameter, with the nearest; for a
    parameter without inputs and outputs, or whose products sum over different axes; and for a rank
    below 1 or an alpha that is not positive.

    >>> from quantjax import quantize
    >>> q = quantize({"dense": {"kernel": jnp.ones((64, 32)), "bias": jnp.ones(32)}}, "nf4")
    >>> adapters = init(q, "**/kernel", 4, jax.random.key(0), alpha=8)
    >>> adapters["dense/kernel"].a.shape, adapters["dense/kernel"].b.shape
    ((64, 1, 4), (1, 32, 4))
    >>> adapters["dense/kernel"].scale
    2.0
    """
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"lora.init: rank must be 1 or more, got {rank!r}.")
    if alpha is not None and not alpha > 0:
        raise ValueError(f"lora.init: alpha must be positive, got {alpha!r}.")
    quantized = quantized_leaves(qparams, "lora.init")
    adapters = {}
    for name in _wanted(where, quantized, qparams):
        shapes, inputs = _shapes(name, quantized[name], sites)
        leaf_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        a = jax.random.normal(leaf_key, (*shapes[0], rank)) / math.sqrt(inputs)
        b = jnp.zeros((*shapes[1], rank))
        adapters[name] = Adapter(a, b, scale=1.0 if alpha is None else alpha / rank)
    return adapters


def quantized_leaves(tree: Any, who: str) -> dict[str, QTensor]:
    """The quantized leaves by name; ValueError where two have the same."""
    found: dict[str, QTensor] = {}
    for name, leaf in named_leaves(tree)[0]:
        if not isinstance(leaf, QTensor):
            continue
        if name in found:
            raise ValueError(f"{who}: two quantized parameters are called {name}.")
        found[name] = leaf
    return found


def _wanted(where: Any, quantized: dict[str, QTensor], tree: Any) -> list[str]:
    """The names of the quantized parameters that are meant, in the order of the tree."""
    if isinstance(where, Policy | Resolved):
        decided = where.explain(tree)
        return [name for name in quantized if decided[name].spec is not None]
    patterns = [where] if isinstance(where, str) else list(where)
    found = set()
    for pattern in patterns:
        regex = compile_pattern(pattern)
        matches = [name for name in quantized if regex.fullmatch(name)]
        if not matches:
            raise ValueError(
                f"lora.init: pattern {pattern!r} matches no quantized parameter. Nearest: "
                f"{nearest(pattern, quantized)}."
            )
        found.update(matches)
    return [name for name in quantized if name in found]


def _shapes(name: str, q: QTensor, sites: Sequence[Any]) -> tuple[tuple[list[int], list[int]], int]:
    """The shapes of a and b without the rank, and the number of inputs."""
    shared, outputs, inputs = _axes(name, q, sites)
    if not outputs or not inputs:
        raise ValueError(
            f"{name}: an adapter needs axes of inputs and of outputs, but of shape {q.shape} the "
            f"inputs are the axes {list(inputs)} and the outputs {list(outputs)}."
        )

    def along(axes: Sequence[int]) -> list[int]:
        return [n if a in (*shared, *axes) else 1 for a, n in enumerate(q.shape)]

    return (along(inputs), along(outputs)), math.prod(q.shape[a] for a in inputs)


def _axes(
    name: str, q: QTensor, sites: Sequence[Any]
) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """The axes of layers and experts, of outputs, and of inputs."""
    forms = {form for site in sites if site.path == name and (form := matrix_form(site))}
    axes = {(form.batch, form.output, form.contracting) for form in forms}
    if len({frozenset(inputs) for _, _, inputs in axes}) > 1:
        uses = " and ".join(str(list(inputs)) for _, _, inputs in axes)
        raise ValueError(f"{name}: its products sum over different axes: {uses}.")
    if axes:
        return axes.pop()
    lead = q.ndim - len(q.block)
    rest = range(lead, q.ndim)
    output = lead if name.rsplit("/", 1)[-1] in FIRST else q.ndim - 1
    return range(lead), [output], [a for a in rest if a != output]
