"""The knapsack against hand-worked numbers and against trying everything."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.allocation import allocate, chance_mixed, lesson


def worth(posterior, size):
    return chance_mixed(*posterior, size) * lesson(*posterior)


def test_chance_of_a_mixed_group_by_hand():
    """Beta(1, 1) makes every count of right answers as likely as any other: 2 of n + 1 are not mixed."""
    for size in (2, 3, 8):
        assert chance_mixed(1, 1, size) == pytest.approx((size - 1) / (size + 1))
    assert chance_mixed(1, 1, 1) == 0.0
    assert chance_mixed(2e9, 8e9, 3) == pytest.approx(1 - 0.2**3 - 0.8**3)  # the rate itself is known


def test_lesson_by_hand():
    assert lesson(1, 1) == pytest.approx(1 / 12)  # ∫ p (1 - p)² dp
    assert lesson(1e9, 2e9) == pytest.approx(1 / 3 * (2 / 3) ** 2)
    rates = [lesson(1e9 * p, 1e9 * (1 - p)) for p in (0.1, 1 / 3, 0.5, 0.9)]
    assert max(rates) == rates[1]


def test_chance_is_the_share_of_mixed_groups_drawn():
    rng = random.Random(1)
    draws = 20_000
    mixed = 0
    for _ in range(draws):
        rate = rng.betavariate(2, 5)
        mixed += 0 < sum(rng.random() < rate for _ in range(4)) < 4
    assert mixed / draws == pytest.approx(chance_mixed(2, 5, 4), abs=0.015)


posteriors = st.lists(st.tuples(st.floats(0.5, 40), st.floats(0.5, 40)), min_size=1, max_size=4)


@settings(max_examples=60)
@given(posteriors, st.integers(0, 14))
def test_no_other_way_to_spend_the_budget_is_worth_more(tasks, extra):
    budget = 2 * len(tasks) + extra
    sizes = allocate(tasks, budget=budget, smallest=2, largest=8)
    assert all(2 <= size <= 8 for size in sizes)
    assert sum(sizes) == min(budget, 8 * len(tasks))
    ours = sum(map(worth, tasks, sizes))
    best = max(
        sum(map(worth, tasks, other))
        for other in itertools.product(range(2, 9), repeat=len(tasks))
        if sum(other) <= budget
    )
    assert ours == pytest.approx(best, abs=1e-12)


@settings(max_examples=60)
@given(posteriors, st.lists(st.integers(1, 9), min_size=4, max_size=4), st.integers(0, 60))
def test_unequal_costs_are_kept_to_and_lose_less_than_one_answer(tasks, costs, extra):
    costs = costs[: len(tasks)]
    budget = 2 * sum(costs) + extra
    sizes = allocate(tasks, budget=budget, smallest=2, largest=8, costs=costs)
    assert sum(size * cost for size, cost in zip(sizes, costs)) <= budget
    best = max(
        sum(map(worth, tasks, other))
        for other in itertools.product(range(2, 9), repeat=len(tasks))
        if sum(size * cost for size, cost in zip(other, costs)) <= budget
    )
    one_answer = max(worth(task, 3) - worth(task, 2) for task in tasks)
    assert sum(map(worth, tasks, sizes)) >= best - one_answer - 1e-12


def test_hard_tasks_get_more_than_middling_ones_and_hopeless_ones_least():
    """Known rates: 0.5 is mixed after a few answers; 0.1 pays for more; at 1e-6 no answer helps."""
    sure = 1e7
    sizes = allocate([(sure * p, sure * (1 - p)) for p in (0.5, 0.1, 1e-6)], budget=24, smallest=2, largest=64)
    assert sizes[1] > sizes[0] > sizes[2] == 2


def test_too_small_a_budget_still_gives_everybody_the_smallest_group():
    assert allocate([(1, 1), (5, 1)], budget=1, smallest=2, largest=16) == [2, 2]
    assert allocate([(1, 1)], budget=100, smallest=4, largest=4) == [4]
    assert allocate([], budget=10, smallest=2, largest=4) == []
