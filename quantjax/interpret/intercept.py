"""Run an unmodified function on a tree with quantized leaves: trace, then evaluate."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from quantjax.fake_quantized import FakeQuantized, is_quantized
from quantjax.interpret.errors import check_leaves, check_used, explained
from quantjax.interpret.evaluate import Machine, evaluate
from quantjax.interpret.jax_compat import explicit_sharding
from quantjax.interpret.param import Param, param
from quantjax.interpret.record import Place, Record, Sites
from quantjax.interpret.report import Report, Stored
from quantjax.interpret.statistics import Statistics
from quantjax.paths import named_leaves
from quantjax.qtensor import QTensor


def is_array(leaf: Any) -> bool:
    """Whether a leaf moves: it is an array or stands for one. Others are static."""
    return isinstance(
        leaf, QTensor | FakeQuantized | jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct
    )


def _split(leaves: Sequence[Any]) -> tuple[list[Any], Callable[..., list[Any]]]:
    """The arrays among the leaves, and what puts others in their places, the rest kept."""
    moving = [i for i, leaf in enumerate(leaves) if is_array(leaf)]

    def refill(arrays: Sequence[Any]) -> list[Any]:
        filled = list(leaves)
        for i, array in zip(moving, arrays, strict=True):
            filled[i] = array
        return filled

    return [leaves[i] for i in moving], refill


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """What the function sees of a leaf: the logical array, laid out as it is if types say so."""
    array = leaf
    if is_quantized(leaf):
        array = leaf.qvalue if isinstance(leaf, QTensor) else leaf.value
    if not isinstance(array, jax.Array):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    weak = array is leaf and array.weak_type
    own = {"weak_type": weak, "sharding": explicit_sharding(array)}
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, **own)


class Traced(NamedTuple):
    """A call as a jaxpr of its arrays. named: those, under the paths of the parameters, or None for
    the others. structure: that of the output."""

    jaxpr: Any
    named: list[tuple[str | None, Any]]
    structure: Any


def trace(apply: Callable[..., Any], args: tuple, kwargs: dict) -> Traced:
    """apply(*args, **kwargs) on abstract arrays; parameters are the first argument's."""
    if not args:
        raise TypeError("intercept: the tree of parameters is the first positional argument.")
    tree, *others = args
    named, tree_structure = named_leaves(tree)
    other_leaves, other_structure = jax.tree.flatten((others, kwargs), is_leaf=is_quantized)
    if any(map(is_quantized, other_leaves)):
        raise ValueError(
            "intercept: a quantized leaf outside the first argument; pass quantized parameters "
            "there."
        )
    leaves = [*(leaf for _, leaf in named), *other_leaves]
    names = [name for name, _ in named] + [None] * len(other_leaves)
    moving, refill = _split(leaves)
    names = [name for name, leaf in zip(names, leaves, strict=True) if is_array(leaf)]
    out_structure = None

    def flat(*arrays: Any) -> list[Any]:
        nonlocal out_structure
        filled = refill(arrays)
        first = jax.tree.unflatten(tree_structure, filled[: len(named)])
        rest, words = jax.tree.unflatten(other_structure, filled[len(named) :])
        out, out_structure = jax.tree.flatten(apply(first, *rest, **words))
        return out

    named_arrays = list(zip(names, moving, strict=True))
    check_leaves(named_arrays)
    with explained(named_arrays):
        jaxpr = jax.make_jaxpr(flat)(*map(_abstract, moving))
    check_used(jaxpr, [name if is_quantized(leaf) else None for name, leaf in named_arrays])
    return Traced(jaxpr, named_arrays, out_structure)


def run(machine: Machine, apply: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
    """apply(*args, **kwargs), evaluated by the machine; parameters are the first argument's."""
    jaxpr, named, structure = trace(apply, args, kwargs)
    slot = machine.statistics.slot
    values = [x if name is None else param(_as_leaf(x), name, slot(name)) for name, x in named]
    out = evaluate(machine, jaxpr, values, Place())
    return jax.tree.unflatten(structure, [x.array() if isinstance(x, Param) else x for x in out])


def _as_leaf(leaf: Any) -> Any:
    return leaf if is_quantized(leaf) else jnp.asarray(leaf)


@dataclasses.dataclass(frozen=True)
class Intercepted:
    """`apply` on quantized parameters; see `intercept`."""

    apply: Callable[..., Any]
    strict: bool = False

    def __call__(self, params: Any, /, *args: Any, **kwargs: Any) -> Any:
        machine = Machine(Record(), self.strict)
        return run(machine, self.apply, (params, *args), kwargs)

    def report(self, params: Any, /, *args: Any, **kwargs: Any) -> Report:
        """How the products of a call would be computed and what would stay float, by tracing
        alone; the arguments may be ShapeDtypeStructs."""
        record = record_of(self.apply, (params, *args), kwargs)
        used = {site.path for site in record.sites} | {r.path for r in record.remarks}
        named = [(name, leaf) for name, leaf in named_leaves(params)[0] if is_array(leaf)]
        others = tuple(name for name, _ in named if name not in used)
        stored = {name: _stored(leaf) for name, leaf in named}
        return Report(record.sites, record.remarks, others, stored)


def _stored(leaf: Any) -> Stored:
    size = math.prod(leaf.shape)
    held = leaf.nbytes if isinstance(leaf, QTensor) else size * np.dtype(leaf.dtype).itemsize
    return Stored(held, size * 4)


def intercept(apply: Callable[..., Any], *, strict: bool = False) -> Intercepted:
    """The function `apply(params, ...)` for trees whose leaves are quantized.

    Traces `apply` with the logical float arrays in place of QTensors and evaluates the trace:
    a quantized leaf stays so through transposes, reshapes and casts, jit, scan, remat, cond and
    while, up to the product that uses it. There it is dequantized, or, where its policy quantizes
    activations as well (`QuantSpec.act`), the other operand is rounded with one scale a row and
    the product is one of integers. The signature stays that of `apply`; its first argument
    is the tree. Leaves and arguments that are not arrays are static. On leaves that
    `quantjax.qat.prepare` made, products are those of floats with both sides rounded, to train.

    Raises ValueError under `strict`, naming the parameter, where one becomes float anywhere but at
    a product.

    >>> import quantjax as qj
    >>> apply = lambda p, x: x @ p["kernel"]
    >>> q = qj.quantize({"kernel": jnp.array([[1.0, -2.0], [0.5, 4.0]])}, "w8")
    >>> intercept(apply)(q, jnp.array([2.0, 0.0])).tolist()
    [2.0, -4.0314...]
    """
    return Intercepted(apply, strict)


def sites(apply: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Sites:
    """Every product of `apply(params, *args)` that uses a parameter, found by tracing alone.

    `params` may hold arrays, quantized leaves or ShapeDtypeStructs. A parameter that is used
    twice is listed twice. Where one enters what is not entered, such as a custom VJP, `.remarks`
    says so.

    >>> apply = lambda p, x: x @ p["kernel"].T
    >>> p = {"kernel": jax.ShapeDtypeStruct((8, 4), jnp.float32)}
    >>> [(s.path, s.contracting, s.flops) for s in sites(apply, p, jnp.ones((2, 4)))]
    [('kernel', (1,), 128)]
    """
    record = record_of(apply, (params, *args), kwargs)
    return Sites(record.sites, [r for r in record.remarks if r.path])


def record_of(
    apply: Callable[..., Any], args: tuple, kwargs: dict, statistics: Statistics | None = None
) -> Record:
    """What an evaluation on abstract values notes; in `statistics` what it would observe."""
    machine = Machine(Record(), statistics=statistics or Statistics())
    leaves, structure = jax.tree.flatten((args, kwargs), is_leaf=is_quantized)
    moving, refill = _split(leaves)

    def traced(*arrays: Any) -> Any:
        rest, words = jax.tree.unflatten(structure, refill(arrays))
        return run(machine, apply, rest, words)

    jax.eval_shape(traced, *moving)
    return machine.record
