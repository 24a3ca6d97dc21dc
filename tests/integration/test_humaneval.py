"""HumanEval: a test program that runs apart from the answer it tests, and cannot be talked into a verdict."""

from __future__ import annotations

import gzip
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rewards.grade import grade
from rewards.sandbox import Limits, Sandbox
from rewards.task import Score, Task

DATA = Path(os.environ.get("DROVER_DATA", Path(__file__).parents[3] / "shared" / "data")) / "humaneval.jsonl.gz"

INCREMENT = {
    "prompt": 'def add_one(x):\n    """ x plus one """\n',
    "test": "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(5) == 6\n",
    "entry_point": "add_one",
}


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(workers=2, limits=Limits(cpu_s=1, wall_s=20.0)) as running:
        yield running


def grade_answer(check: dict[str, str], text: str, sandbox: Sandbox) -> Score:
    task = Task(task_id="t", domain="code", level=0, prompt=check["prompt"], verifier="humaneval", check=check)
    result = grade(task, text, sandbox)
    assert isinstance(result, Score), result
    return result


@pytest.mark.skipif(not DATA.exists(), reason="HumanEval's file is not here (set DROVER_DATA)")
def test_all_canonical_solutions_earn_full_reward_and_empty_bodies_none(sandbox: Sandbox) -> None:
    with gzip.open(DATA, "rt") as file:
        problems = [json.loads(line) for line in file]
    began = time.monotonic()
    scores = {row["task_id"]: grade_answer(row, row["canonical_solution"], sandbox) for row in problems}
    print(f"\n{sum(score.value for score in scores.values()):.0f} of {len(scores)} in {time.monotonic() - began:.1f} s")
    assert len(scores) == 164
    assert {name: score.reason for name, score in scores.items() if score.value != 1.0} == {}
    assert [row["task_id"] for row in problems if grade_answer(row, "    return None\n", sandbox).value] == []


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("    return x + 1\n", 1.0),
        ("Answer:\n    return x + 1\n", 1.0),
        ("Here:\n```python\ndef add_one(x):\n    return x + 1\n```\nDone.", 1.0),
        ("Answer: x + 1", 0.0),  # not a body: does not continue the prompt
        ("    return x + 2\n", 0.0),
    ],
)
def test_a_body_and_a_whole_function_are_accepted(sandbox: Sandbox, text: str, score: float) -> None:
    assert grade_answer(INCREMENT, text, sandbox).value == score


def test_python_types_survive_the_way_between_the_processes(sandbox: Sandbox) -> None:
    values = ["(1, [2, (3,)])", "{1, 2}", "{(1, 2): {'a': None}}", "frozenset({1})", "1 + 2j", "b'ab'", "[1, 1.5]"]
    test = "def check(candidate):\n" + "".join(
        f"    assert candidate({value}) == {value} and type(candidate({value})) is type({value})\n" for value in values
    )
    check = {"prompt": "def same(x):\n    ''' x '''\n", "test": test, "entry_point": "same"}
    assert grade_answer(check, "    return x\n", sandbox) == Score(1.0, "correct")


@pytest.mark.parametrize(
    "body",
    [
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "print('passed'); return 'passed'",
        # knows the protocol and where its channel is, and takes the nonce of its own request from the stack
        "import os, sys, json\n    nonce = sys._getframe(1).f_locals['request']['nonce']\n"
        "    os.write(3, json.dumps({'nonce': nonce, 'value': 'passed'}).encode() + b'\\n'); os._exit(0)",
        "class Same:\n        def __eq__(self, other): return True\n    return Same()",
        "class Same(int):\n        def __eq__(self, other): return True\n    return Same(99)",
        "import builtins; builtins.AssertionError = Exception; return 0",
        "raise AssertionError",
        "while True: pass",
    ],
)
def test_no_trick_forges_a_pass(sandbox: Sandbox, body: str) -> None:
    assert grade_answer(INCREMENT, f"    {body}\n", sandbox).value == 0.0


def test_the_answer_finds_no_object_of_the_tests(sandbox: Sandbox) -> None:
    """The answer looks for a global name of the test program among all objects it can reach, and says what it found."""
    search = (
        "{own}import gc\n\ndef add_one(x):\n    word = 'test_' + 'secret'\n"
        "    return 77 if any(isinstance(thing, dict) and word in thing for thing in gc.get_objects()) else 0\n"
    )
    check = dict(INCREMENT, test="test_secret = 77\ndef check(candidate):\n    assert candidate(1) == test_secret\n")
    assert grade_answer(check, search.format(own=""), sandbox).value == 0.0
    assert grade_answer(check, search.format(own="test_secret = 1\n"), sandbox).value == 1.0  # the search does search
