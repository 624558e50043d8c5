"""How many bits should each parameter have? The least predicted loss within a budget.

HAWQ-V3 (Yao et al. 2021, arXiv:2011.10680) adds up a loss for each layer; CLADO (Deng et al. 2023,
arXiv:2307.05657) also what two layers do together. Both here: `knapsack` and `quadratic`."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from quantjax.allocate.candidates import Option
from quantjax.allocate.knapsack import Chosen, choose
from quantjax.allocate.quadratic import NODES, choose_with_pairs
from quantjax.allocate.report import Sensitivity
from quantjax.paths import compile_pattern, nearest
from quantjax.policy import Policy

Cost = Callable[[Option], float] | Mapping[tuple[str, str], float]


def stored_bytes(option: Option) -> float:
    """Codes, scales, zero points and codebook."""
    return option.bytes


def operations(option: Option) -> float:
    """Multiply-adds of its products times the bits of the weight, for one call."""
    return option.operations


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allocation:
    """policy: the format of every parameter. loss: the change of the loss predicted for it. bound:
    no choice within the budget has a smaller prediction. cost: what it costs, of `budget`.
    formats: the label chosen for each path."""

    policy: Policy
    loss: float
    bound: float
    cost: float
    budget: float
    formats: dict[str, str]

    @property
    def gap(self) -> float:
        """How far the predicted loss may be from the best: 0 where it is proven the best."""
        return self.loss - self.bound


def allocate_bits(
    sensitivity: Sensitivity,
    budget: float,
    *,
    cost: Cost = stored_bytes,
    pairs: bool | None = None,
    tie: Sequence[str] = (),
    nodes: int = NODES,
) -> Allocation:
    """The format of every parameter, so that the predicted loss is least within a budget.

    min sum_k loss_k + sum_{k<l} pairs_kl over one format a parameter, the sums over all layers of
    all parameters in the format chosen. Without pairs this is solved exactly; with them by branch
    and bound, exactly where it ends within `nodes` nodes. `Allocation.gap` is what is not proven.

    budget: in bytes of the whole tree, leaves that no format quantizes included, where `cost` is
    `stored_bytes`; else in what `cost` gives: `operations`, a function of an option, or a table of
    measured costs by (path, format). pairs: whether two parameters have a term together; None for
    where the sensitivity has them (not with `Mode.HESSIAN`). tie: patterns; the parameters that one
    matches share a format, as those that add to one residual stream.

    Raises ValueError, naming both limits, for a budget below the least or above the greatest cost;
    for a pattern that nothing matches, and for a table without an entry that is needed.

    >>> import jax, jax.numpy as jnp
    >>> import quantjax as qj
    >>> apply = lambda p, x: jax.nn.relu(x @ p["u"]) @ p["v"]
    >>> params = {n: jax.random.normal(jax.random.key(i), (32, 32)) for i, n in enumerate("uv")}
    >>> batches = list(jax.random.normal(jax.random.key(2), (8, 4, 32)))
    >>> report = qj.sensitivity(apply, params, batches, ["w4", "w8"], products=0)
    >>> found = qj.allocate_bits(report, 2000)  # bytes; all in w4 take 1280, in w8 2304
    >>> sorted(found.formats.values()), found.cost
    (['w4', 'w8'], 1792.0)
    """
    if pairs and sensitivity.pairs is None:
        raise ValueError(f"allocate_bits: {sensitivity.mode} gives no pairs; leave pairs= out.")
    groups = _groups(sensitivity, tie)
    options = {(o.path, o.format): o for o in sensitivity.options}
    fixed = sensitivity.kept_bytes if cost is stored_bytes else 0
    costs = [
        np.array([sum(_cost(cost, options[p, f]) for p in g) for f in sensitivity.formats], float)
        for g in groups
    ]
    _check_budget(budget, costs, fixed)
    use = sensitivity.pairs is not None if pairs is None else pairs
    values, between = _values(sensitivity, groups, use)
    found: Chosen
    if use:
        found = choose_with_pairs(values, between, costs, budget - fixed, nodes=nodes)
    else:
        found = choose(values, costs, budget - fixed)
    formats = {
        path: sensitivity.formats[j]
        for paths, j in zip(groups, found.choice, strict=True)
        for path in paths
    }
    formats = {o.path: formats[o.path] for o in sensitivity.options}  # in the tree's order
    return Allocation(
        policy=Policy([(path, options[path, f].spec) for path, f in formats.items()]),
        loss=found.value,
        bound=found.bound,
        cost=found.cost + fixed,
        budget=budget,
        formats=formats,
    )


def predicted_loss(
    sensitivity: Sensitivity, formats: Mapping[str, str], *, pairs: bool | None = None
) -> float:
    """The change of the loss predicted where each path has the format of this label."""
    use = sensitivity.pairs is not None if pairs is None else pairs
    chosen = [k for k, item in enumerate(sensitivity.items) if formats[item.path] == item.format]
    loss = float(_losses(sensitivity)[chosen].sum())
    if use:
        assert sensitivity.pairs is not None
        block = sensitivity.pairs[np.ix_(chosen, chosen)]
        loss += float(np.triu(block, 1).sum())
    return loss


def _losses(sensitivity: Sensitivity) -> Float[np.ndarray, " K"]:
    cells = {(r.path, c.format, r.layer): c.loss for r in sensitivity.rows for c in r.cells}
    layers: dict[str, list[tuple[int, ...]]] = {}
    for row in sensitivity.rows:
        layers.setdefault(row.path, []).append(row.layer)
    return np.array([cells[i.path, i.format, layers[i.path][i.layer]] for i in sensitivity.items])


def _groups(sensitivity: Sensitivity, tie: Sequence[str]) -> list[list[str]]:
    """The paths that share a format, those of patterns first joined where they overlap."""
    paths = list(dict.fromkeys(o.path for o in sensitivity.options))
    of = {path: {path} for path in paths}
    for pattern in tie:
        regex = compile_pattern(pattern)
        matched = [path for path in paths if regex.fullmatch(path)]
        if not matched:
            raise ValueError(
                f"allocate_bits: tie pattern {pattern!r} matches no parameter. Nearest: "
                f"{nearest(pattern, paths)}."
            )
        joined = set().union(*(of[path] for path in matched))
        of.update(dict.fromkeys(joined, joined))
    found = {id(group): group for group in of.values()}
    return [[path for path in paths if path in group] for group in found.values()]


def _cost(cost: Cost, option: Option) -> float:
    if not isinstance(cost, Mapping):
        return cost(option)
    if (option.path, option.format) not in cost:
        raise ValueError(
            f"{option.path}: the table of costs has no entry ({option.path!r}, {option.format!r})."
        )
    return cost[option.path, option.format]


def _check_budget(budget: float, costs: Sequence[np.ndarray], fixed: float) -> None:
    least = sum(c.min() for c in costs) + fixed
    most = sum(c.max() for c in costs) + fixed
    if not least <= budget <= most:
        raise ValueError(
            f"allocate_bits: the budget {budget:,g} must lie between {least:,g}, everything in its "
            f"cheapest format, and {most:,g}, everything in its dearest."
        )


def _values(
    sensitivity: Sensitivity, groups: list[list[str]], use: bool
) -> tuple[list[np.ndarray], np.ndarray]:
    """The loss of every option of every group, and what any two options add together."""
    column: dict[tuple[str, str], int] = {}
    for g, paths in enumerate(groups):
        for j, f in enumerate(sensitivity.formats):
            column.update({(path, f): g * len(sensitivity.formats) + j for path in paths})
    loss = _losses(sensitivity)
    belongs = np.zeros((len(groups) * len(sensitivity.formats), len(loss)))
    for k, item in enumerate(sensitivity.items):
        belongs[column[item.path, item.format], k] = 1.0
    value, between = belongs @ loss, np.zeros((len(belongs),) * 2)
    if use:
        assert sensitivity.pairs is not None
        between = belongs @ sensitivity.pairs @ belongs.T
        # Items that share an option meet each other in it.
        value = value + (np.diag(between) - belongs @ np.diag(sensitivity.pairs)) / 2
    return np.split(value, len(groups)), between
