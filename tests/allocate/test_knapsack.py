"""The knapsacks are held against all choices, one by one."""

import itertools

import numpy as np
import pytest

from quantjax.allocate.knapsack import choose, total
from quantjax.allocate.quadratic import choose_with_pairs

SEEDS = range(5)


def instance(seed, groups=5, options=4, whole=True):
    """Values that fall with rising costs, roughly, as the loss does with bits; some dominated."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, options + 1, groups)
    values, costs = [], []
    for n in sizes:
        cost = rng.integers(1, 60, n).astype(float) if whole else rng.uniform(0.1, 6, n)
        values.append(rng.exponential(5, n) / cost + 0.1 * rng.normal(size=n))
        costs.append(cost)
    return values, costs


def within(cost, budget):
    return cost <= budget * (1 + 1e-12)


def budgets(costs):
    low, high = sum(c.min() for c in costs), sum(c.max() for c in costs)
    return [low, low + 0.2 * (high - low), low + 0.5 * (high - low), high]


def everything(values, costs, budget, pairs=None):
    """The least value over all choices within the budget."""
    starts = np.cumsum([0, *(len(v) for v in values[:-1])])
    best = np.inf
    for choice in itertools.product(*(range(len(v)) for v in values)):
        if not within(total(costs, choice), budget):
            continue
        value = total(values, choice)
        if pairs is not None:
            rows = starts + np.asarray(choice)
            block = pairs[np.ix_(rows, rows)]
            value += np.triu(block, 1).sum()
        best = min(best, value)
    return best


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_no_choice_is_better(seed, whole):
    values, costs = instance(seed, whole=whole)
    for budget in budgets(costs):
        found = choose(values, costs, budget)
        assert within(found.cost, budget)
        np.testing.assert_allclose(found.value, everything(values, costs, budget), rtol=1e-12)
        np.testing.assert_allclose(found.bound, found.value, rtol=1e-12)
        assert total(values, found.choice) == found.value
        assert total(costs, found.choice) == found.cost


@pytest.mark.parametrize("seed", SEEDS)
def test_too_few_states_give_an_honest_bound(seed):
    values, costs = instance(seed, groups=7)
    for budget in budgets(costs):
        found = choose(values, costs, budget, states=1)
        best = everything(values, costs, budget)
        assert within(found.cost, budget)
        assert found.bound <= best + 1e-12 * (1 + abs(best)) and best <= found.value + 1e-12


def test_a_large_problem_is_proven():
    # 60 layers of 7 formats, sizes as in a network: the search must not grow with the budget.
    rng = np.random.default_rng(0)
    size = np.round(np.exp(rng.uniform(5, 14, 60)))
    bits = np.array([1, 2, 3, 4, 5, 6, 8])
    values = [rng.exponential() * 4.0**-bits * rng.uniform(0.7, 1.4, 7) for _ in size]
    costs = [np.ceil(n * bits / 8) + 4 * np.ceil(n / 64) for n in size]
    for share in (0.2, 0.5, 0.8):
        budget = (1 - share) * sum(c.min() for c in costs) + share * sum(c.max() for c in costs)
        found = choose(values, costs, budget)
        assert found.value - found.bound <= 1e-12


def test_a_budget_below_the_least_cost_raises():
    with pytest.raises(ValueError, match="budget 1 is below the least cost, 2"):
        choose([np.zeros(2)], [np.array([2.0, 3.0])], 1.0)


def interactions(seed, options, convex):
    rng = np.random.default_rng(100 + seed)
    s = rng.normal(size=(options, 3 if convex else options))
    return s @ s.T if convex else s + s.T


@pytest.mark.parametrize("convex", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_no_choice_is_better_with_pairs(seed, convex):
    values, costs = instance(seed, groups=5 if convex else 4)
    pairs = interactions(seed, sum(map(len, values)), convex)
    for budget in budgets(costs):
        found = choose_with_pairs(values, pairs, costs, budget, nodes=10_000)
        best = everything(values, costs, budget, pairs)
        assert within(found.cost, budget)
        np.testing.assert_allclose(found.value, best, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(found.bound, best, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("convex", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_few_nodes_give_an_honest_bound(seed, convex):
    values, costs = instance(seed, groups=6)
    pairs = interactions(seed, sum(map(len, values)), convex)
    for budget in budgets(costs):
        found = choose_with_pairs(values, pairs, costs, budget, nodes=0)
        best = everything(values, costs, budget, pairs)
        assert within(found.cost, budget)
        assert found.bound <= best + 1e-9 and best <= found.value + 1e-9


@pytest.mark.parametrize("seed", SEEDS)
def test_without_pairs_it_is_the_linear_problem(seed):
    values, costs = instance(seed)
    none = np.zeros((sum(map(len, values)),) * 2)
    for budget in budgets(costs):
        found = choose_with_pairs(values, none, costs, budget)
        np.testing.assert_allclose(found.value, choose(values, costs, budget).value, atol=1e-9)


def test_pairs_that_are_no_matrix_of_the_options_raise():
    with pytest.raises(ValueError, match="symmetric matrix of 2 options"):
        choose_with_pairs([np.zeros(2)], np.zeros((3, 3)), [np.ones(2)], 5.0)
