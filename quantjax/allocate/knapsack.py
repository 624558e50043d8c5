"""Which option should every group take, so that the sum of values is least within a budget?

The multiple-choice knapsack problem, solved exactly: dynamic programming over the states that no
other dominates, of which those are dropped whose Lagrangian bound exceeds a known solution.
Sinha and Zoltners 1979 (the linear relaxation); Pisinger 1995 (bounded dynamic programming)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

STATES = 1 << 18  # kept at once; beyond that the answer carries a gap


class Chosen(NamedTuple):
    """An option for every group. bound: no choice within the budget has a smaller value; equal
    to `value`, up to rounding, where the choice is proven to be the best."""

    choice: tuple[int, ...]
    value: float
    cost: float
    bound: float


def choose(
    values: Sequence[Float[np.ndarray, " _"]],
    costs: Sequence[Float[np.ndarray, " _"]],
    budget: float,
    *,
    states: int = STATES,
) -> Chosen:
    """min sum_g values[g][j_g]  subject to  sum_g costs[g][j_g] <= budget.

    Exact, unless more than `states` partial choices stay open at once: then those of the best
    bounds are kept, and `bound` is the least bound among the dropped. Values may be negative.
    Costs that are no integers meet the budget up to 1e-12 of its size, as their sum is rounded.

    Raises ValueError if the least costs exceed the budget.

    >>> worth = [np.array([3.0, 1.0]), np.array([5.0, 0.0])]
    >>> choose(worth, [np.array([1.0, 2.0]), np.array([1.0, 3.0])], 4.0)
    Chosen(choice=(0, 1), value=3.0, cost=4.0, bound=3.0)
    """
    values = [np.asarray(v, np.float64) for v in values]
    costs = [np.asarray(c, np.float64) for c in costs]
    least = sum(float(c.min()) for c in costs)
    if any((c % 1).any() for c in costs):
        budget = budget + 1e-12 * abs(budget)
    if least > budget:
        raise ValueError(f"the budget {budget:g} is below the least cost, {least:g}.")
    kept = [_undominated(v, c) for v, c in zip(values, costs, strict=True)]
    groups = [(v[k], c[k]) for v, c, k in zip(values, costs, kept, strict=True)]
    # Large groups first, as their choices decide most of what is left of the budget.
    order = sorted(range(len(groups)), key=lambda g: -float(np.ptp(groups[g][1])))
    picks, bound = _search([groups[g] for g in order], budget, states)
    choice = [0] * len(groups)
    for g, pick in zip(order, picks, strict=True):
        choice[g] = int(kept[g][pick])
    value, cost = total(values, choice), total(costs, choice)
    return Chosen(tuple(choice), value, cost, min(bound, value))


def total(parts: Sequence[Float[np.ndarray, " _"]], choice: Sequence[int]) -> float:
    """The sum of what each group's choice has."""
    return float(sum(float(part[j]) for part, j in zip(parts, choice, strict=True)))


def _undominated(value: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Indices, by rising cost, of the options that no other one beats in both."""
    order = np.lexsort((value, cost))
    falls = np.minimum.accumulate(value[order])
    return order[np.concatenate([[True], value[order][1:] < falls[:-1]])]


def multiplier(groups: Sequence[tuple[np.ndarray, np.ndarray]], budget: float) -> float:
    """The price of a unit of cost at which the linear relaxation just spends the budget.

    On the lower convex hull of each group, the steps to dearer options are taken in the order of
    what they gain per unit of cost; the rate of the step that would exceed the budget is it.
    """
    rates, steps, spent = [], [], 0.0
    for value, cost in groups:
        hull = _hull(value, cost)
        spent += float(cost[hull[0]])
        steps.append(np.diff(cost[hull]))
        rates.append(-np.diff(value[hull]) / np.diff(cost[hull]))
    rate, step = np.concatenate(rates), np.concatenate(steps)
    order = np.argsort(-rate, kind="stable")
    beyond = np.flatnonzero(spent + np.cumsum(step[order]) > budget)
    return float(rate[order][beyond[0]]) if beyond.size else 0.0


def _hull(value: np.ndarray, cost: np.ndarray) -> list[int]:
    """The lower convex hull of options in rising cost and falling value."""
    hull: list[int] = []
    for k in range(len(value)):
        while len(hull) > 1:
            i, j = hull[-2:]
            left = (value[j] - value[i]) * (cost[k] - cost[i])
            if left < (value[k] - value[i]) * (cost[j] - cost[i]):
                break
            hull.pop()
        hull.append(k)
    return hull


def _search(
    groups: Sequence[tuple[np.ndarray, np.ndarray]], budget: float, states: int
) -> tuple[list[int], float]:
    """The best option of every group, and the bound."""
    price = multiplier(groups, budget)
    relaxed = [int(np.argmin(v + price * c)) for v, c in groups]
    # What the groups still to come add: to the Lagrangian, to the least cost, and to value and
    # cost if each takes the option that its price asks for.
    lagrangian = _to_come([float((v + price * c).min()) for v, c in groups])
    least = _to_come([float(c.min()) for _, c in groups])
    likely_value = _to_come([float(v[j]) for (v, _), j in zip(groups, relaxed, strict=True)])
    likely_cost = _to_come([float(c[j]) for (_, c), j in zip(groups, relaxed, strict=True)])
    known, best = _greedy(groups, budget, price)
    slack = 1e-12 * (1 + sum(float(np.abs(v).max()) for v, _ in groups))

    value, cost = np.zeros(1), np.zeros(1)
    trail: list[tuple[np.ndarray, np.ndarray]] = []  # of each state: its parent, its pick
    dropped = np.inf
    for g, (v, c) in enumerate(groups):
        new_value = (value[:, None] + v).ravel()
        new_cost = (cost[:, None] + c).ravel()
        bound = new_value + price * (new_cost - budget) + lagrangian[g + 1]
        reach = np.flatnonzero(new_cost + likely_cost[g + 1] <= budget)
        if reach.size:
            first = reach[np.argmin(new_value[reach])]
            reached = float(new_value[first]) + likely_value[g + 1]
            if reached < known:
                past = _walk(trail, int(first) // len(v))
                known, best = reached, [*past, int(first) % len(v), *relaxed[g + 1 :]]
        fits = new_cost + least[g + 1] <= budget
        open_ = np.flatnonzero(fits & (bound <= known + slack))
        if not open_.size:  # only where the way to `best` was dropped
            return best, dropped
        open_ = open_[_undominated(new_value[open_], new_cost[open_])]
        if len(open_) > states:
            rank = np.argsort(bound[open_], kind="stable")
            dropped = min(dropped, float(bound[open_[rank[states]]]))
            open_ = open_[np.sort(rank[:states])]
        value, cost = new_value[open_], new_cost[open_]
        trail.append(((open_ // len(v)).astype(np.int32), (open_ % len(v)).astype(np.int32)))
    end = int(np.argmin(value))
    return (best if known < value[end] else _walk(trail, end)), dropped


def _walk(trail: Sequence[tuple[np.ndarray, np.ndarray]], end: int) -> list[int]:
    """The picks that led to a state of the last stage."""
    picks = []
    for parent, pick in reversed(trail):
        picks.append(int(pick[end]))
        end = int(parent[end])
    return picks[::-1]


def _to_come(parts: list[float]) -> np.ndarray:
    """Entry g: the sum of parts[g:]."""
    return np.concatenate([np.cumsum(parts[::-1])[::-1], [0.0]])


def _greedy(
    groups: Sequence[tuple[np.ndarray, np.ndarray]], budget: float, price: float
) -> tuple[float, list[int]]:
    """A choice within the budget and its value: the options of the relaxation at a price that is
    raised until they fit; infinity if they never do."""
    for _ in range(64):
        picks = [int(np.argmin(v + price * c)) for v, c in groups]
        if total([c for _, c in groups], picks) <= budget:
            return total([v for v, _ in groups], picks), picks
        price = 1.1 * price
    return np.inf, []
