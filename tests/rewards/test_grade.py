"""What each verifier accepts and refuses, through the one door `grade`."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from rewards.grade import grade
from rewards.sandbox import Sandbox
from rewards.task import BadTask, Score, Task, Ungraded


def task(verifier: Any, **check: Any) -> Task:
    return Task(task_id="t", domain="d", level=1, prompt="p", verifier=verifier, check=check)


def earned(result: Score | Ungraded) -> float:
    assert isinstance(result, Score), result
    return result.value


# ---------------------------------------------------------------------------------------------- number


@pytest.mark.parametrize(
    ("wanted", "text", "score"),
    [
        ("18", "He has 18.\n#### 18", 1.0),
        ("18", "7 plus 11 is 18", 0.0),  # the last number of a text is not its final answer
        ("18", "Answer: 17\nAnswer: 18", 1.0),
        ("18", "Answer: 18\nAnswer: 17", 0.0),
        ("1234", "#### 1,234", 1.0),
        ("1234", "Answer: $1234.00.", 1.0),
        ("1,234", "Answer: 1234", 1.0),
        ("-5", "Answer: −5", 1.0),
        ("-5", "Answer: -$5", 1.0),
        ("50", "Answer: 50%", 1.0),
        ("123", "Answer: 1,2,3", 0.0),  # a list, not a number
        ("0.1", "Answer: .1", 1.0),
        ("12", "Answer:\n12\nSo 13 is wrong.", 1.0),
        ("12", "Answer: ", 0.0),
        ("12", "", 0.0),
    ],
)
def test_plain_numbers_need_no_sandbox(wanted: str, text: str, score: float) -> None:
    never_started = Sandbox()  # would raise if it were used, which the list of numbers alone does
    if text == "Answer: 1,2,3":
        with pytest.raises(RuntimeError, match="start the sandbox"):
            grade(task("number", answer=wanted), text, never_started)
    else:
        assert earned(grade(task("number", answer=wanted), text, never_started)) == score


@pytest.mark.parametrize(
    ("wanted", "answer", "score"),
    [
        ("0.5", r"\frac{1}{2}", 1.0),
        (r"\frac{1}{2}", "0.5", 1.0),
        ("12", r"\boxed{12}", 1.0),
        ("12", "12 apples", 1.0),
        ("12", "x = 12", 1.0),
        ("13", "12 apples", 0.0),
        ("13", "12 or 13", 0.0),  # a hedge earns nothing
        ("12", "12 or 13", 0.0),
        ("123", "1,2,3", 0.0),
        ("12", "I do not know", 0.0),
        ("x^2+2x+1", "(x+1)^2", 1.0),
        ("12", "__import__('os').system('true')", 0.0),
    ],
)
def test_other_numbers_go_to_math_verify(sandbox: Sandbox, wanted: str, answer: str, score: float) -> None:
    assert earned(grade(task("number", answer=wanted), f"So.\nAnswer: {answer}", sandbox)) == score


def test_math_verify_works_in_any_thread(sandbox: Sandbox) -> None:
    results: list[Score | Ungraded] = []
    run = threading.Thread(target=lambda: results.append(grade(task("number", answer="0.5"), "#### 1/2", sandbox)))
    run.start()
    run.join(30)
    assert [earned(result) for result in results] == [1.0]


def test_a_hang_in_math_verify_is_killed_and_not_scored(sandbox: Sandbox) -> None:
    result = grade(task("number", answer="10"), "Answer: 10000000!", sandbox)
    assert result == Ungraded("math-verify timeout")


# ---------------------------------------------------------------------------------------------- text and form


@pytest.mark.parametrize(
    ("text", "score"),
    [("Answer: Ann Bob", 1.0), ("so\nAnswer: ann  bob\n", 1.0), ("Answer: bob ann", 0.0), ("ann bob", 0.0)],
)
def test_text_ignores_case_and_space_only(sandbox: Sandbox, text: str, score: float) -> None:
    assert earned(grade(task("text", answer="ann bob"), text, sandbox)) == score


@pytest.mark.parametrize(
    ("constraint", "good", "bad"),
    [
        ({"kind": "word_count", "n": 2}, "fox cow", "fox cow hen"),
        ({"kind": "case", "case": "upper"}, "FOX COW", "FOX Cow"),
        ({"kind": "case", "case": "lower"}, "fox cow", "Fox cow"),
        ({"kind": "separator", "text": ", "}, "fox, cow", "fox,cow"),
        ({"kind": "separator", "text": "-"}, "fox-cow", "fox - cow"),
        ({"kind": "separator", "text": "|"}, "fox|cow", "fox-cow"),
        ({"kind": "starts_with", "letter": "c"}, "cow Cat", "cow fox"),
        ({"kind": "ends_with", "text": "!"}, "fox cow!", "fox! cow"),
        ({"kind": "contains", "word": "fox"}, "a fox", "a foxglove"),
        ({"kind": "excludes", "letter": "e"}, "fox cow", "fox HEN"),
        ({"kind": "sorted"}, "ant Bee cow", "cow ant"),
        ({"kind": "distinct"}, "fox cow", "fox Fox"),
        ({"kind": "word_length", "n": 3}, "fox cow.", "fox goat"),
        ({"kind": "from_list", "words": ["fox", "cow"]}, "COW fox", "cow hen"),
        ({"kind": "last_word", "word": "cow"}, "fox cow!", "cow fox"),
        ({"kind": "first_word", "word": "fox"}, "Fox cow", "cow fox"),
    ],
)
def test_each_constraint_holds_and_fails(sandbox: Sandbox, constraint: dict, good: str, bad: str) -> None:
    form = task("form", constraints=[constraint])
    assert earned(grade(form, f"1 cow 2 hen\nAnswer: {good}", sandbox)) == 1.0
    assert earned(grade(form, f"1 fox 2 cow\nAnswer: {bad}", sandbox)) == 0.0
    assert grade(form, good, sandbox) == Score(0.0, "no final answer")


def test_form_names_the_first_constraint_that_fails(sandbox: Sandbox) -> None:
    constraints = [{"kind": "separator", "text": "-"}, {"kind": "word_count", "n": 3}, {"kind": "sorted"}]
    form = task("form", constraints=constraints)
    assert earned(grade(form, "Answer: ant-bee-cow", sandbox)) == 1.0
    assert grade(form, "Answer: cow-bee", sandbox) == Score(0.0, "word_count 3 does not hold")


@pytest.mark.parametrize("constraints", [[], [{"kind": "rhymes"}], [{"kind": "word_count"}]])
def test_a_form_task_that_checks_nothing_is_refused(sandbox: Sandbox, constraints: list) -> None:
    with pytest.raises(BadTask, match="task t"):
        grade(task("form", constraints=constraints), "Answer: fox", sandbox)


# ---------------------------------------------------------------------------------------------- code

SQUARES = {"function": "f", "cases": [[[2], 4], [[3], 9], [[-1], 1]]}


@pytest.mark.parametrize(
    ("text", "score", "reason"),
    [
        ("Answer: x*x", 1.0, "correct"),
        ("Answer: def f(x): return x**2", 1.0, "correct"),
        ("Plan\nAnswer:\ndef f(x):\n y = x\n return y*x", 1.0, "correct"),
        ("Try\n```python\ndef f(x): return 0\n```\nor\n```python\ndef f(x):\n    return x * x\n```", 1.0, "correct"),
        ("def f(x): return x * x", 1.0, "correct"),
        ("def f(x): return x * x\nAnswer: x + 1", 0.0, "case 1 of 3: got 3, wanted 4"),
        ("Answer: x + x", 0.0, "case 2 of 3: got 6, wanted 9"),
        ("Answer: float(x) * x", 1.0, "correct"),
        ("Answer: str(x * x)", 0.0, "case 1 of 3: got '4', wanted 4"),
        ("Answer: 1 / 0", 0.0, "case 1 of 3: ZeroDivisionError: division by zero"),
        ("Answer: def g(x): return x", 0.0, "NameError: no function 'f' is defined"),
        ("Answer: lambda lambda", 0.0, "SyntaxError"),
        ("", 0.0, ""),
    ],
)
def test_code_answers(sandbox: Sandbox, text: str, score: float, reason: str) -> None:
    result = grade(task("code", **SQUARES), text, sandbox)
    assert earned(result) == score
    assert isinstance(result, Score) and reason in result.reason


@pytest.mark.parametrize(
    ("expected", "expression", "score"),
    [
        ([1, 2], "(1, 2)", 1.0),
        ([1, 2], "[1, 2.0]", 1.0),
        ([1, 2], "[1, 2, 3]", 0.0),
        ([1, 2], "{1, 2}", 0.0),
        (True, "x == x", 1.0),
        (True, "1", 0.0),
        (1, "True", 0.0),
        (0.3, "0.1 + 0.2", 1.0),
        (1, "10 ** 400", 0.0),
        (0.5, "10 ** 400", 0.0),
        ({"a": 1}, "{'a': 1}", 1.0),
        ({"a": 1}, "{'a': 2}", 0.0),
        (None, "None", 1.0),
        ("é", "'é'", 1.0),
        (1, "float('nan')", 0.0),
    ],
)
def test_values_are_compared_as_data(sandbox: Sandbox, expected: Any, expression: str, score: float) -> None:
    assert earned(grade(task("code", function="f", cases=[[[1], expected]]), f"Answer: {expression}", sandbox)) == score


def test_a_code_task_without_cases_is_refused(sandbox: Sandbox) -> None:
    with pytest.raises(BadTask, match="task t: .* any program would pass"):
        grade(task("code", function="f", cases=[]), "Answer: x", sandbox)


def test_an_unknown_verifier_is_refused(sandbox: Sandbox) -> None:
    with pytest.raises(BadTask, match="task t: no verifier 'vibes'"):
        grade(task("vibes"), "Answer: good", sandbox)


def test_a_broken_sandbox_leaves_the_answer_ungraded(monkeypatch: pytest.MonkeyPatch) -> None:
    with Sandbox() as own:
        monkeypatch.setattr("rewards.sandbox.MAX_RESTARTS", 0)
        own._brokers["plain"].stop()
        result = grade(task("code", **SQUARES), "Answer: x*x", own)
    assert isinstance(result, Ungraded) and "sandbox: " in result.reason
