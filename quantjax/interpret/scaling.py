"""What can be scaled channel by channel, and what must then be scaled back, so that a model stays
the same function? Found on its flat program, for every parameter at once.

Every parameter has unknown scales, one for each row and column of a product's weights and one an
element of others. `scales_of` follows them through all operations; those that no operation fixes
are free. Used by activation-aware scaling (arXiv:2306.00978), SmoothQuant (2211.10438), cross-layer
equalization (1906.04721) and the folding of norms.

    found = find_scaling(apply, params, x)
    group = found.group("dense2/kernel")     # None: found.reason("dense2/kernel") says why
    params = group.scaled(params, s)         # the same function; inputs of dense2 times 1 / s"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from quantjax.interpret.abstract import interpret
from quantjax.interpret.intercept import is_array, sites
from quantjax.interpret.program import Key, Leaf, Program, flatten
from quantjax.interpret.record import Site
from quantjax.interpret.scale_context import State
from quantjax.interpret.scales_of import Scales
from quantjax.interpret.unknowns import ONE, Scale, Unknowns
from quantjax.paths import named_leaves


@dataclasses.dataclass(frozen=True, eq=False)
class Factor:
    """How the scales s of a group enter one parameter: times s[index] ** power.

    leaf: the parameter, one layer of it if scans take layers off. index: of the rank of that
    layer and broadcast against it; the channel of each position, -1 where s does not enter.
    role: "in" for a product's weights along what it sums over, "out" along its outputs, "" for
    biases, gains and the like.
    """

    leaf: Leaf
    index: np.ndarray
    power: float
    role: str


@dataclasses.dataclass(frozen=True, eq=False)
class ScaleGroup:
    """Channels with one scale each that can be moved from the weights of some products to what
    comes before them.

    channels: how many. consumers: the weights that are multiplied by s along what their product
    sums over, so that its input is divided by s; products of one input are in one group.
    producers: everything else that changes, mostly with power -1. positive: whether s must be; a
    group without relu, pools and the like takes any s but zero.
    """

    channels: int
    consumers: tuple[Factor, ...]
    producers: tuple[Factor, ...]
    positive: bool

    def scaled(self, params: Any, s: Float[Array, "channels"]) -> Any:
        """The tree that computes the same function, with the consumers' inputs divided by s."""
        return scaled(params, [(self, s)])

    def index(self, leaf: Leaf) -> np.ndarray:
        """The channel of every input of a consumer, broadcast against its layer; -1 for none."""
        for factor in self.consumers:
            if factor.leaf.key == leaf.key:
                return factor.index
        names = ", ".join(factor.leaf.name for factor in self.consumers)
        raise ValueError(f"{leaf.name}: no consumer of this group; those are {names}.")


@dataclasses.dataclass(frozen=True, eq=False)
class Scaling:
    """All that can be scaled in a model. reasons: by parameter and layer, why the inputs of its
    products keep their scale, where none or not all of them are in a group."""

    groups: tuple[ScaleGroup, ...]
    reasons: dict[Key, str]

    def group(self, path: str, layer: tuple[int, ...] = ()) -> ScaleGroup | None:
        """The group that the inputs of this parameter's products are in; None if there is none,
        or if they are in several."""
        found = [
            group
            for group in self.groups
            if any(f.leaf.path == path and f.leaf.layer == layer for f in group.consumers)
        ]
        return found[0] if len(found) == 1 else None

    def reason(self, path: str, layer: tuple[int, ...] = ()) -> str:
        """Why inputs of its products keep their scale; empty if all of them are free."""
        return self.reasons.get((path, layer), "")


def scaled(params: Any, scales: Sequence[tuple[ScaleGroup, Float[Array, "_"]]]) -> Any:
    """The tree after several groups were scaled, each by its s; leaves must be float arrays."""
    named, structure = named_leaves(params)
    leaves = dict(named)
    for group, s in scales:
        for factor in (*group.consumers, *group.producers):
            path, layer = factor.leaf.path, factor.leaf.layer
            leaves[path] = _times(leaves[path], layer, factor, s)
    return jax.tree.unflatten(structure, [leaves[path] for path, _ in named])


def _times(leaf: Array, layer: tuple[int, ...], factor: Factor, s: Float[Array, "_"]) -> Array:
    leaf = jnp.asarray(leaf)
    values = s.astype(jnp.promote_types(leaf.dtype, jnp.float32))[factor.index]
    inside = factor.index >= 0
    x = leaf[layer]
    match factor.power:
        case 1.0:
            x = x * jnp.where(inside, values, 1)
        case -1.0:  # a quotient of equal numbers is one, to the bit
            x = x / jnp.where(inside, values, 1)
        case power:
            x = x * jnp.where(inside, values, 1) ** power
    x = x.astype(leaf.dtype)
    return leaf.at[layer].set(x) if layer else x


def find_scaling(apply: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Scaling:
    """The groups of channels of `apply(params, ...)` that can be scaled, by tracing alone.

    `params` and the arguments may be ShapeDtypeStructs. What a model computes stays the same for
    any s of a group, up to float rounding.

    >>> apply = lambda p, x: jax.nn.relu(x @ p["a"] + p["b"]) @ p["c"]
    >>> p = {"a": jnp.ones((2, 3)), "b": jnp.ones(3), "c": jnp.ones((3, 1))}
    >>> (group,) = find_scaling(apply, p, jnp.ones((4, 2))).groups
    >>> [(f.leaf.path, f.role, f.power) for f in (*group.consumers, *group.producers)]
    [('c', 'in', 1.0), ('a', 'out', -1.0), ('b', '', -1.0)]
    >>> find_scaling(apply, p, jnp.ones((4, 2))).reason("a")
    "it is the model's input"
    """
    return groups_of(solve(apply, (params, *args), kwargs))


@dataclasses.dataclass(frozen=True, eq=False)
class Solved:
    """The unknowns after every instruction was seen. leaves: the factors of every parameter's
    scale, by path and layer. values: those of every value."""

    program: Program
    unknowns: Unknowns
    leaves: dict[Key, State]
    values: dict[int, State]

    @functools.cached_property
    def parts(self) -> dict[Key, list[Scale]]:
        """By parameter, the factors of its scale, each of one solved unknown at a position."""
        return {
            key: [part for x in factors or () for part in self.unknowns.parts(x)]
            for key, factors in self.leaves.items()
        }


def solve(
    apply: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    tied: bool = False,
) -> Solved:
    """Follows the scales of all parameters, the first of `args`, through a call of `apply`. tied:
    no gain takes one scale to another."""
    kwargs = kwargs or {}
    program = flatten(apply, *args, **kwargs)
    by_path: dict[str, list[Site]] = {}
    for site in sites(apply, *args, **kwargs):
        by_path.setdefault(site.path, []).append(site)
    shapes = {path: tuple(x.shape) for path, x in named_leaves(args[0])[0] if is_array(x)}
    unknowns = Unknowns(tied=tied)
    leaves, values = interpret(Scales(unknowns, shapes, by_path), program)
    return Solved(program, unknowns, leaves, values)


def group_of(solved: Solved, node: np.ndarray) -> ScaleGroup:
    """The group with a channel for each of these unknowns, solved, different and in order, whose
    scale it is: what has them with power 1 is multiplied by s."""
    number = np.zeros(solved.unknowns.size, np.int64)
    number[node] = 1
    return _groups(solved, number, np.ones(len(number)))[0]


def groups_of(solved: Solved) -> Scaling:
    """The groups of channels whose scale is free."""
    unknowns = solved.unknowns
    uses = [x for found in solved.parts.values() for x in found if x.role == "in" and x.node.any()]
    groups = _groups(solved, *_grouped(unknowns.size, uses))
    reasons = {
        key: "; ".join(why)
        for key, factors in solved.leaves.items()
        for x in factors or ()
        if x.role == "in" and (why := unknowns.why(x))
    }
    return Scaling(tuple(g for g in groups if g.consumers and g.producers), reasons)


def _groups(solved: Solved, number: np.ndarray, orientation: np.ndarray) -> list[ScaleGroup]:
    """The groups 1, 2, ... of all unknowns by `number`, which is 0 for those in none. An unknown
    scale is s of its channel to the power of `orientation`."""
    ends = np.cumsum(np.bincount(number))[:-1]
    members = np.split(np.argsort(number, kind="stable"), ends)
    channel = np.full(len(number), -1)
    for nodes in members[1:]:
        channel[nodes] = np.arange(len(nodes))
    consumers: list[list[Factor]] = [[] for _ in members]
    producers: list[list[Factor]] = [[] for _ in members]
    for (path, layer), parts in solved.parts.items():
        for part in parts:
            power = np.round(part.power * orientation[part.node], 9)
            owner = number[part.node]
            for g in np.unique(owner[owner > 0]).tolist():
                for p in np.unique(power[owner == g]).tolist():
                    index = np.where((owner == g) & (power == p), channel[part.node], -1)
                    side = consumers if part.role == "in" else producers
                    side[g].append(Factor(Leaf(path, layer), index, p, part.role))
    return [
        ScaleGroup(
            len(members[g]),
            tuple(consumers[g]),
            tuple(producers[g]),
            bool(solved.unknowns.is_positive(members[g]).any()),
        )
        for g in range(1, len(members))
    ]


def _grouped(size: int, uses: Sequence[Scale]) -> tuple[np.ndarray, np.ndarray]:
    """By unknown, the number of its group, 0 for none, and the power that makes the first consumer
    take s itself: unknowns in the input of one product are in one group."""
    group_of, orientation = np.zeros(size, np.int64), np.ones(size)
    for n, x in enumerate(uses, start=1):
        nodes, first = np.unique(x.node, return_index=True)
        powers = x.power.ravel()[first]
        free = nodes != ONE
        nodes, powers = nodes[free], powers[free]
        new = group_of[nodes] == 0
        orientation[nodes[new]] = 1 / powers[new]
        met = np.unique(group_of[nodes[~new]])
        group_of[np.isin(group_of, met) & (group_of > 0)] = n
        group_of[nodes] = n
    return group_of, orientation
