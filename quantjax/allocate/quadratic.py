"""Which options are best where the loss of two together is not the sum of theirs?

The quadratic multiple-choice knapsack problem of CLADO (Deng et al. 2023, arXiv:2307.05657):
min a'x + x'Qx / 2 over one option a group, within a budget. Branch and bound on the subsets of a
group's options (Beale and Tomlin 1970). The bound of a node is that of the convex relaxation over
the hull of the *integer* choices, by pairwise Frank-Wolfe steps (Lacoste-Julien and Jaggi 2015,
arXiv:1511.05932): each step solves one linear knapsack, whose solution is a candidate as well.
Candidates are improved by exchanging options in one group and in two."""

import heapq
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer

from quantjax.allocate.knapsack import Chosen, choose

# K options of all groups, one after another

NODES = 30
STEPS = 30
CLOSE = 1e-9  # relative to the size of the objective: what counts as proven


class Problem(NamedTuple):
    """linear, quadratic: a and Q of a'x + x'Qx / 2. cost, group: of every option."""

    linear: Float[np.ndarray, " K"]
    quadratic: Float[np.ndarray, "K K"]
    cost: Float[np.ndarray, " K"]
    group: Integer[np.ndarray, " K"]

    def value(self, x: Float[np.ndarray, " K"]) -> float:
        """The objective."""
        return float(self.linear @ x + x @ self.quadratic @ x / 2)


def choose_with_pairs(
    values: Sequence[Float[np.ndarray, " _"]],
    pairs: Float[np.ndarray, "K K"],
    costs: Sequence[Float[np.ndarray, " _"]],
    budget: float,
    *,
    nodes: int = NODES,
) -> Chosen:
    """min sum_g values[g][j_g] + sum_{g<h} pairs[j_g, j_h]  within the budget.

    Row k of the symmetric `pairs` is the k-th option of all groups, one after another; entries
    within a group are never paid, but help the bound where they make it positive semidefinite.
    Exact where branch and bound ends within `nodes` nodes: then `bound` equals `value` up to
    1e-9 of its size. Else `bound` is the least of the open nodes'.

    Raises ValueError if the least costs exceed the budget, or `pairs` is not symmetric.

    >>> pairs = np.zeros((4, 4))
    >>> pairs[0, 2] = pairs[2, 0] = 9.0
    >>> choose_with_pairs([np.zeros(2), np.zeros(2)], pairs, [np.array([1.0, 2.0])] * 2, 3.0).cost
    3.0
    """
    sizes = [len(v) for v in values]
    if pairs.shape != (sum(sizes),) * 2 or not np.allclose(pairs, pairs.T, rtol=1e-5, atol=1e-12):
        raise ValueError(f"pairs: expected a symmetric matrix of {sum(sizes)} options.")
    group = np.repeat(np.arange(len(sizes)), sizes)
    given = Problem(np.concatenate(values), pairs, np.concatenate(costs), group)
    scale = CLOSE * (1e-30 + np.abs(given.linear).max() + np.abs(pairs).max(initial=0.0))

    best = np.inf, np.zeros(len(group))
    root = np.ones(len(group), bool)
    starts = []
    for problem in _convex(given):
        bound, x, best = _relax(problem, budget, root, best, scale)
        starts.append((bound, x, problem))
    bound, x, problem = max(starts, key=lambda start: start[0])
    count = itertools.count()  # breaks ties in the heap
    heap = [(bound, next(count), root, x)]
    for _ in range(nodes):
        if not heap or heap[0][0] >= best[0] - scale:
            break
        _, _, allowed, x = heapq.heappop(heap)
        for part in _split(problem, allowed, x):
            if _least(problem, part) > budget:
                continue
            bound, x_part, best = _relax(problem, budget, part, best, scale)
            if bound < best[0] - scale:
                heapq.heappush(heap, (bound, next(count), part, x_part))
    proven = min([best[0], *(bound for bound, *_ in heap)])
    choice = np.flatnonzero(best[1]) - np.cumsum([0, *sizes[:-1]])
    return Chosen(tuple(map(int, choice)), best[0], float(problem.cost @ best[1]), proven)


def _convex(p: Problem) -> list[Problem]:
    """Problems with the same value at every choice and a positive semidefinite matrix.

    As x_k^2 = x_k and x_k x_l = 0 within a group, the blocks of the matrix within groups are free:
    what their diagonal has, the linear part lacks by half. The less they hold, the better the bound
    (Billionnet et al. 2009, doi:10.1016/j.dam.2007.12.007). So: the least multiple t of blocks E
    with Q + t E convex, once for E the blocks of Q itself, once for the identity.
    """
    size = np.abs(p.quadratic).max(initial=0.0)
    same = p.group[:, None] == p.group[None, :]
    between = np.where(same, 0.0, p.quadratic)
    identity = np.eye(len(p.linear))
    found = []
    for blocks in (np.where(same, p.quadratic, 0.0), size * identity):
        values, vectors = np.linalg.eigh(blocks)
        if values[0] < -1e-9 * size or values[-1] <= 0:
            continue
        root = vectors / np.sqrt(np.maximum(values, 0) + 1e-9 * values[-1])
        least = float(np.linalg.eigvalsh(root.T @ between @ root)[0])
        t = max(0.0, -least) * (1 + 1e-9)
        # The blocks as they were regularized, so that the least eigenvalue is theirs.
        whole = t * (blocks + 1e-9 * values[-1] * identity)
        found.append(p._replace(linear=p.linear - np.diag(whole) / 2, quadratic=between + whole))
    return found or [p._replace(quadratic=between)]


def _least(p: Problem, allowed: np.ndarray) -> float:
    return sum(float(p.cost[allowed & (p.group == g)].min()) for g in range(p.group[-1] + 1))


def _split(p: Problem, allowed: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two halves of the options of the group that x is least sure of, cut where the cost of its
    mix lies between them."""
    fraction = np.array([(x * (1 - x))[p.group == g].sum() for g in range(p.group[-1] + 1)])
    open_ = np.array([allowed[p.group == g].sum() > 1 for g in range(p.group[-1] + 1)])
    g = int(np.argmax(np.where(open_, fraction, -1.0)))
    options = np.flatnonzero(allowed & (p.group == g))
    options = options[np.argsort(p.cost[options], kind="stable")]
    share = np.cumsum(x[options])
    cut = int(np.clip(np.searchsorted(share, 0.5) + 1, 1, len(options) - 1))
    if share[cut - 1] > 1 - 1e-9 and cut > 1:  # else x would stay as it is in one half
        cut -= 1
    lower, upper = allowed.copy(), allowed.copy()
    lower[options[cut:]], upper[options[:cut]] = False, False
    return lower, upper


def _relax(
    p: Problem, budget: float, allowed: Bool[np.ndarray, " K"], best: tuple, scale: float
) -> tuple[float, np.ndarray, tuple[float, np.ndarray]]:
    """A lower bound within the allowed options, the mix of choices that attains the relaxation,
    and the best choice known."""
    atom, _ = _linear(p, p.linear, budget, allowed)
    atoms, weights = [atom], [1.0]
    x, bound = atom.copy(), -np.inf
    for step in range(STEPS):
        if step < 4:
            best = _better(p, budget, atom, best)
        elif (value := p.value(atom)) < best[0]:
            best = value, atom
        slope = p.linear + p.quadratic @ x
        atom, least = _linear(p, slope, budget, allowed)
        gap = slope @ x - least  # of the convex function: f(y) >= f(x) + slope (y - x)
        bound = max(bound, p.value(x) - gap)
        if bound >= best[0] - scale or gap <= scale:
            break
        # The pairwise step: from the worst choice in the mix to the one just found.
        worst = int(np.argmax([slope @ a for a in atoms]))
        way = atom - atoms[worst]
        bend = way @ p.quadratic @ way
        drop = -(slope @ way)
        if drop <= 0:
            break
        length = weights[worst] if bend <= 0 else min(weights[worst], drop / bend)
        same = next((i for i, a in enumerate(atoms) if np.array_equal(a, atom)), None)
        if same is None:
            atoms.append(atom)
            weights.append(0.0)
            same = len(atoms) - 1
        weights[same] += length
        weights[worst] -= length
        if weights[worst] <= 1e-15:
            atoms.pop(worst)
            weights.pop(worst)
        x = np.asarray(weights) @ np.stack(atoms)
    return bound, x, best


def _linear(
    p: Problem, slope: np.ndarray, budget: float, allowed: np.ndarray
) -> tuple[np.ndarray, float]:
    """The choice of the least slope within the budget, and a bound on it."""
    members = [np.flatnonzero(allowed & (p.group == g)) for g in range(p.group[-1] + 1)]
    found = choose([slope[m] for m in members], [p.cost[m] for m in members], budget)
    x = np.zeros(len(slope))
    for m, j in zip(members, found.choice, strict=True):
        x[m[j]] = 1.0
    return x, found.bound


def _better(
    p: Problem, budget: float, x: np.ndarray, best: tuple[float, np.ndarray]
) -> tuple[float, np.ndarray]:
    """The better of the best known choice and x after exchanges, of one option or of two, as long
    as one gains."""
    x = x.copy()
    other_group = p.group[:, None] != p.group[None, :]
    for _ in range(4 * len(x)):
        # From the option that its group has now, to every option.
        now = np.flatnonzero(x)[p.group]
        slope = p.linear + p.quadratic @ x
        q = p.quadratic
        single = slope - slope[now] + (np.diag(q) + q[now, now]) / 2 - q[np.arange(len(x)), now]
        cost = p.cost - p.cost[now]
        cross = q - q[:, now] - q[now, :] + q[np.ix_(now, now)]
        gain = single[:, None] + single[None, :] + cross
        fits = p.cost @ x + cost[:, None] + cost[None, :] <= budget
        gain = np.where(fits & other_group, gain, np.inf)
        one = np.where(p.cost @ x + cost <= budget, single, np.inf)
        np.fill_diagonal(gain, one)
        k, j = np.unravel_index(int(np.argmin(gain)), gain.shape)
        if gain[k, j] >= -1e-12 * (1e-30 + np.abs(p.linear).max()):
            break
        x[now[[k, j]]] = 0.0
        x[[k, j]] = 1.0
    value = p.value(x)
    return (value, x) if value < best[0] else best
