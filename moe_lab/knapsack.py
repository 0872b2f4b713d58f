"""One choice of each group, so that errors have the least sum and costs fit a budget: exactly.

The multiple-choice knapsack. Costs are whole numbers, such as bytes, and are never rounded. States
(cost so far, error so far) are carried from group to group; one goes when another is neither dearer
nor worse, and when a Lagrangian bound says that nothing that follows makes it the best.
By hand: a solver of integer programs (scipy's HiGHS) takes a choice of 1e-6 of an option for none,
which in costs of gigabytes is more than what two choices differ by.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BISECTIONS = 100  # of bisection for the multiplier
SLACK = 1e-12  # of the best sum: what rounding may take from a bound


class NoRoom(ValueError):
    """The cheapest choices cost more than the budget: `least`."""

    def __init__(self, least: int):
        super().__init__(f"the cheapest choices cost {least}")
        self.least = least


Group = Sequence[tuple[int, float]]  # the choices: cost and error of each


def best_choices(groups: Sequence[Group], budget: int) -> list[int]:
    """The place of the choice in each group: the least sum of errors with costs up to `budget`.

    Raises NoRoom where not even the cheapest choices fit.
    """
    least = sum(min(cost for cost, _ in group) for group in groups)
    if least > budget:
        raise NoRoom(least)
    tables = [_undominated(group) for group in groups]
    multiplier = _multiplier(tables, budget)
    best = _total(tables, _cheapest_at(tables, multiplier))
    bound = _filled_up(tables, _cheapest_at(tables, multiplier), budget)
    assert best[0] <= budget
    return _searched(tables, budget, multiplier, min(best[1], bound))


Undominated = tuple[
    np.ndarray, np.ndarray, np.ndarray
]  # costs, errors, places; costs ascend, errors fall


def _undominated(group: Group) -> Undominated:
    """The choices that could be best: none that another is neither dearer nor worse than."""
    cost = np.array([one for one, _ in group], dtype=np.int64)
    error = np.array([one for _, one in group], dtype=np.float64)
    kept = _front(cost, error)
    return cost[kept], error[kept], kept


def _front(cost: np.ndarray, error: np.ndarray) -> np.ndarray:
    """The places of the undominated ones, by ascending cost."""
    order = np.lexsort((error, cost))
    before = np.minimum.accumulate(np.concatenate(([np.inf], error[order][:-1])))
    front: np.ndarray = order[error[order] < before]
    return front


def _cheapest_at(tables: Sequence[Undominated], multiplier: float) -> list[int]:
    """Of each group the choice with the least error + multiplier * cost; ties: the cheapest."""
    return [int(np.argmin(error + multiplier * cost)) for cost, error, _ in tables]


def _total(tables: Sequence[Undominated], taken: Sequence[int]) -> tuple[int, float]:
    chosen = zip(tables, taken, strict=True)
    pairs = [(int(cost[place]), float(error[place])) for (cost, error, _), place in chosen]
    return sum(cost for cost, _ in pairs), sum(error for _, error in pairs)


def _multiplier(tables: Sequence[Undominated], budget: int) -> float:
    """The least multiplier, but for rounding, at which the choices fit the budget."""
    if _total(tables, _cheapest_at(tables, 0.0))[0] <= budget:
        return 0.0
    below, above = 0.0, 1.0
    while _total(tables, _cheapest_at(tables, above))[0] > budget:
        above *= 4
    for _ in range(BISECTIONS):
        middle = (below + above) / 2
        fits = _total(tables, _cheapest_at(tables, middle))[0] <= budget
        below, above = (below, middle) if fits else (middle, above)
    return above


def _filled_up(tables: Sequence[Undominated], taken: Sequence[int], budget: int) -> float:
    """The sum of errors when what is left of the budget is spent greedily: a bound from above."""
    places = list(taken)
    left = budget - _total(tables, places)[0]
    steps = []
    for number, (cost, error, _) in enumerate(tables):
        for place in range(places[number] + 1, len(cost)):
            price = int(cost[place] - cost[places[number]])
            if price <= left:
                steps.append(((error[places[number]] - error[place]) / price, number, place))
    for _, number, place in sorted(steps, reverse=True):
        cost = tables[number][0]
        price = int(cost[place] - cost[places[number]])
        if 0 < price <= left:
            places[number], left = place, left - price
    return _total(tables, places)[1]


def _searched(
    tables: Sequence[Undominated], budget: int, multiplier: float, known: float
) -> list[int]:
    """The places of the best choices; known: a sum of errors that can be had."""
    least = [int(cost[0]) for cost, _, _ in tables]
    relaxed = [float((error + multiplier * cost).min()) for cost, error, _ in tables]
    cost, error = np.zeros(1, dtype=np.int64), np.zeros(1)
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    for number, (costs, errors, _) in enumerate(tables):
        room = budget - sum(least[number + 1 :])
        rest = sum(relaxed[number + 1 :]) - multiplier * budget
        every = (cost[:, None] + costs).ravel()
        lost = (error[:, None] + errors).ravel()
        bound = lost + multiplier * every + rest
        possible = np.flatnonzero((every <= room) & (bound <= known + SLACK * abs(known) + 1e-300))
        kept = possible[_front(every[possible], lost[possible])]
        trail.append(np.divmod(kept, len(costs)))
        cost, error = every[kept], lost[kept]
    return _traced(tables, trail, int(error.argmin()))


def _traced(
    tables: Sequence[Undominated], trail: Sequence[tuple[np.ndarray, np.ndarray]], last: int
) -> list[int]:
    """The places in the groups that led to a last state."""
    found = []
    for (_, _, places), (before, choice) in zip(tables[::-1], trail[::-1], strict=True):
        found.append(int(places[choice[last]]))
        last = int(before[last])
    return found[::-1]
