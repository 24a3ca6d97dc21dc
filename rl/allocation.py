"""How many answers each task of a step gets, out of one budget (Knapsack RL, Li et al. 2025, with a posterior in the
place of their point estimate).

A group of n answers is worth P(some right, some wrong | n) · E[p (1 - p)²] over p ~ Beta(α, β), with s = α + β:

    P(mixed | n)   = 1 - E[pⁿ] - E[(1-p)ⁿ],   E[pⁿ] = Π_{j<n} (α + j)/(s + j)
    one answer more adds  (β·E[pⁿ] + α·E[(1-p)ⁿ]) / (s + n)
    E[p (1-p)²]    = α β (β + 1) / (s (s + 1)(s + 2))     what such a group teaches: most at p = 1/3

What one answer more adds falls with n, so taking the best answer again and again is optimal where answers cost alike,
and short of it by less than one answer's worth where they do not.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def chance_mixed(alpha: float, beta: float, size: int) -> float:
    """That `size` answers are neither all right nor all wrong, p ~ Beta(alpha, beta)."""
    return 1.0 - sum(_all_alike(alpha, beta, size))


def _all_alike(alpha: float, beta: float, size: int) -> tuple[float, float]:
    """E[pⁿ] and E[(1-p)ⁿ]: that all of n answers are right, and that all are wrong."""
    right = wrong = 1.0
    for j in range(size):
        right *= (alpha + j) / (alpha + beta + j)
        wrong *= (beta + j) / (alpha + beta + j)
    return right, wrong


def lesson(alpha: float, beta: float) -> float:
    """E[p (1 - p)²]."""
    total = alpha + beta
    return alpha * beta * (beta + 1.0) / (total * (total + 1.0) * (total + 2.0))


def allocate(
    posteriors: Sequence[tuple[float, float]],
    *,
    budget: float,
    smallest: int,
    largest: int,
    costs: Sequence[float] | None = None,
) -> list[int]:
    """Group sizes, each from `smallest` to `largest`, of the highest worth together that `budget` buys.

    `posteriors`: (α, β) of each task. `costs`: of one answer to each, in the budget's unit, tokens say; None: 1 each.
    Everybody gets `smallest`, even where the budget does not buy that. Ties go to the earlier task.
    """
    costs = [1.0] * len(posteriors) if costs is None else list(costs)
    sizes = [smallest] * len(posteriors)
    left = budget - smallest * sum(costs)
    alike = [_all_alike(alpha, beta, smallest) for alpha, beta in posteriors]  # at each task's present size

    def offer(i: int) -> tuple[float, int]:
        """One answer more to task i: minus its worth for its price, and who it is."""
        (alpha, beta), (right, wrong) = posteriors[i], alike[i]
        gain = (beta * right + alpha * wrong) / (alpha + beta + sizes[i])
        return -gain * lesson(alpha, beta) / costs[i], i

    offers = [offer(i) for i in range(len(posteriors)) if smallest < largest]
    heapq.heapify(offers)
    while offers:
        _, i = heapq.heappop(offers)
        if costs[i] > left:
            continue
        (alpha, beta), (right, wrong), size = posteriors[i], alike[i], sizes[i]
        total = alpha + beta + size
        alike[i] = right * (alpha + size) / total, wrong * (beta + size) / total
        sizes[i] += 1
        left -= costs[i]
        if sizes[i] < largest:
            heapq.heappush(offers, offer(i))
    return sizes
