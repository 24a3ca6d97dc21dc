"""A mutated task's answer is that of its parents, worked on: checked by the real verifiers on real problems."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from rewards.domains import generate, worked_solution
from rewards.grade import grade
from rewards.mutations import combine, extend, go_on, wrap, written
from rewards.sandbox import Sandbox
from rewards.task import UNKNOWN_LEVEL, Score, Task


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox() as sandbox:
        yield sandbox


def number(answer: str, level: int = 3, prompt: str = "How many?") -> Task:
    return Task(task_id=f"n{answer}", domain="maths", level=level, prompt=prompt, verifier="number",
                check={"answer": answer})  # fmt: skip


def test_two_problems_become_one_whose_answer_is_their_sum_or_difference(sandbox) -> None:
    pens, books = number("1,200", prompt="Pens?"), number("-3.5", level=5, prompt="Books?")
    seen = set()
    for seed in range(8):
        task = combine([pens, books], random.Random(seed))
        assert task is not None and task.level == 6 and task.task_id.startswith("combine(n1,200, n-3.5)#")
        right = "1196.5" if " plus " in task.prompt else "1203.5"
        assert grade(task, f"Answer: {right}", sandbox) == Score(1.0, "correct")
        assert grade(task, "Answer: 1200", sandbox).value == 0.0
        seen.add(right)
    assert seen == {"1196.5", "1203.5"}
    assert combine([pens, pens], random.Random(0)) is None, "the same problem twice"
    assert combine([pens, number("x^2")], random.Random(0)) is None, "no number that can be added exactly"


def test_one_more_operation(sandbox) -> None:
    asked = set()
    for seed in range(20):
        task = go_on([number("7")], random.Random(seed))
        assert task is not None
        words = task.prompt.split("and ")[1].split(".")[0].split()
        n = int(words[-1] if words[0] != "add" else words[1])
        right = {"multiply": 7 * n, "add": 7 + n, "subtract": n - 7}[words[0]]
        assert grade(task, f"#### {right}", sandbox).value == 1.0
        asked.add(words[0])
    assert asked == {"multiply", "add", "subtract"}


def test_a_function_that_does_one_thing_more_passes_and_the_old_one_fails(sandbox) -> None:
    for seed in range(4):
        parent = generate("code", 2, seed, "train")
        task = extend([parent], random.Random(seed))
        assert task is not None
        # The prompt's words are those of the domain, so the domain itself can solve it.
        solution = worked_solution(task, "careful", random.Random(0))
        assert grade(task, solution, sandbox) == Score(1.0, "correct")
        assert grade(task, worked_solution(parent, "careful", random.Random(0)), sandbox).value == 0.0
        assert grade(parent, worked_solution(parent, "careful", random.Random(0)), sandbox).value == 1.0


def test_a_wrapped_humaneval_task_asks_for_the_list_and_still_tests_the_value(sandbox) -> None:
    tests = "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(-4) == -3\n"
    check = {"prompt": "def inc(x):\n    'One more.'\n", "entry_point": "inc", "test": tests}
    parent = Task(task_id="h0", domain="code", level=0, prompt="Add one.", verifier="humaneval", check=check)
    task = wrap([parent], random.Random(0))
    assert task is not None
    assert grade(parent, "```python\ndef inc(x):\n    return x + 1\n```", sandbox).value == 1.0
    for body, value in (("[x + 1]", 1.0), ("x + 1", 0.0), ("[x]", 0.0), ("[x + 1, x]", 0.0)):
        assert grade(task, f"```python\ndef inc(x):\n    return {body}\n```", sandbox).value == value, body


def test_a_wrapped_task_is_not_wrapped_again() -> None:
    """The same sentence twice asks for the same list."""
    check = {"prompt": "def inc(x):\n    'One more.'\n", "entry_point": "inc", "test": "def check(candidate): ..."}
    task = Task(task_id="h0", domain="code", level=0, prompt="Add one.", verifier="humaneval", check=check)
    once = wrap([task], random.Random(0))
    assert once is not None and once.level == UNKNOWN_LEVEL, "what is harder than nobody knows what"
    assert wrap([once], random.Random(0)) is None


def test_an_answer_may_be_a_json_number(sandbox) -> None:
    task = Task(task_id="n", domain="maths", level=1, prompt="How many?", verifier="number", check={"answer": 5})
    assert grade(task, "#### 5", sandbox).value == 1.0
    mutated = go_on([task], random.Random(0))
    assert mutated is not None and combine([task, number("1", prompt="And?")], random.Random(0)) is not None


def test_what_does_not_apply_is_none() -> None:
    text = Task(task_id="t", domain="reasoning", level=1, prompt="?", verifier="text", check={"answer": "x"})
    for mutation in (go_on, extend, wrap):
        assert mutation([text], random.Random(0)) is None
    assert combine([text, number("1")], random.Random(0)) is None


@pytest.mark.parametrize("value, text", [
    ("7", "7"), ("-7", "-7"), ("1/2", "0.5"), ("-1/8", "-0.125"), ("0", "0"), ("1201/100", "12.01"), ("1/100", "0.01"),
])  # fmt: skip
def test_numbers_are_written_exactly(value: str, text: str) -> None:
    assert written(Fraction(value)) == text
