"""Generated tasks: repeatable, on their side of the wall, and answered rightly by careful people."""

import random

import pytest

from rewards.domains import DOMAINS, LEVELS, generate, worked_solution
from rewards.grade import grade
from rewards.sandbox import Sandbox
from rewards.task import Score, split_of

CASES = [(domain, level) for domain in DOMAINS for level in LEVELS]


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox() as started:
        yield started


def share_right(domain, level, style, sandbox, count=12):
    verdicts = []
    for seed in range(count):
        task = generate(domain, level, seed, "train")
        verdict = grade(task, worked_solution(task, style, random.Random(seed)), sandbox)
        assert isinstance(verdict, Score), verdict
        verdicts.append(verdict.value)
    return sum(verdicts) / count


@pytest.mark.parametrize("domain,level", CASES)
def test_a_careful_solution_is_right(domain, level, sandbox):
    assert share_right(domain, level, "careful", sandbox, count=4) == 1.0


@pytest.mark.parametrize("domain", DOMAINS)
def test_haste_pays_on_easy_tasks_only(domain, sandbox):
    assert share_right(domain, 1, "hasty", sandbox) > 0.8
    assert share_right(domain, 10, "hasty", sandbox) < 0.3


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_wrong_method_is_mostly_wrong(domain, sandbox):
    assert share_right(domain, 6, "wrong", sandbox) < 0.5


@pytest.mark.parametrize("domain,level", CASES)
def test_no_seed_of_one_side_gives_a_prompt_of_the_other(domain, level):
    held_out = {generate(domain, level, seed, "held_out").prompt for seed in range(20)}
    train = {generate(domain, level, seed, "train").prompt for seed in range(200)}
    assert not held_out & train
    assert {split_of(prompt) for prompt in held_out} == {"held_out"}
    assert generate(domain, level, 3, "train") == generate(domain, level, 3, "train")
