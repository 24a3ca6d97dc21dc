"""The "code" and "humaneval" verifiers: an answer is a program, checked by tests it cannot see or answer for.

`rewards/grade.py` calls both. The program runs in the sandbox and only returns values. For "code" those are compared
here. A HumanEval test is itself a program, so it runs in a second sandboxed process: each call it makes of the
candidate travels through us as data, and only that second process, which runs nothing of the answer's, can say
"passed".
"""

from __future__ import annotations

import math
import re
import secrets
from typing import Any

from rewards.sandbox import AnswerFault, Sandbox, SandboxFailure, Session
from rewards.task import BadTask, Score, Task
from rewards.text_answer import after_last

FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)
MAX_SHOWN_CHARS = 60
MAX_TEST_CALLS = 10_000  # of the candidate by one HumanEval test; the real ones make at most some hundred


def program_of(text: str) -> str:
    """The program in an answer: what follows the last "Answer:" if there is one, and of that the last fenced block if
    there is one. The indentation of its first line is kept where it starts a line."""
    source = after_last(text)
    source = text if source is None else source
    blocks = FENCED.findall(source)
    return blocks[-1] if blocks else source.lstrip(" \t" if source is not text else "").strip("\n")


def grade_code(task: Task, text: str, sandbox: Sandbox) -> Score:
    """1.0 if `check["function"]` gives the expected value in all of `check["cases"]` ([[arguments, expected], ...]).

    Raises SandboxFailure if the sandbox, not the answer, failed; BadTask for a task without cases.
    """
    cases = task.check["cases"]
    if not cases:
        raise BadTask(f"task {task.task_id}: check['cases'] is empty, so any program would pass")
    try:
        values = sandbox.run(program_of(text), task.check["function"], [arguments for arguments, _ in cases])
    except AnswerFault as fault:
        return Score(0.0, str(fault))
    for number, (value, (_, expected)) in enumerate(zip(values, cases, strict=True), start=1):
        if not matches(value, expected):
            return Score(0.0, f"case {number} of {len(cases)}: got {_short(value)}, wanted {_short(expected)}")
    return Score(1.0, "correct")


def matches(value: Any, expected: Any) -> bool:
    """Whether a returned value is the expected JSON value. A tuple counts as a list and 4.0 as 4, True not as 1."""
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    if isinstance(value, (int, float)) and isinstance(expected, (int, float)):
        if isinstance(value, int) and isinstance(expected, int):
            return value == expected
        try:
            return math.isclose(value, expected, rel_tol=1e-9, abs_tol=1e-12)
        except OverflowError:  # an integer beyond floats
            return False
    if isinstance(value, (list, tuple)) and isinstance(expected, list):
        return len(value) == len(expected) and all(map(matches, value, expected))
    if isinstance(value, dict) and isinstance(expected, dict):
        return value.keys() == expected.keys() and all(matches(value[key], expected[key]) for key in expected)
    return type(value) is type(expected) and value == expected


def _short(value: Any) -> str:
    try:
        shown = repr(value)
    except RecursionError:
        shown = "a very deep value"
    return shown if len(shown) <= MAX_SHOWN_CHARS else f"{shown[:MAX_SHOWN_CHARS]}…"


def grade_humaneval(task: Task, text: str, sandbox: Sandbox) -> Score:
    """1.0 if the answer, a whole function or the body that completes `check["prompt"]`, passes `check["test"]`.

    Raises SandboxFailure if the sandbox, not the answer, failed.
    """
    prompt, test, name = (task.check[key] for key in ("prompt", "test", "entry_point"))
    code = program_of(text)
    whole = re.search(rf"^def {re.escape(name)}\b", code, re.MULTILINE)
    with sandbox.sessions(2) as (candidate, tests):
        try:
            candidate.load(f"{prompt}\n{code}" if whole else prompt + code, name)
            verdict = _relay(candidate, tests, name, {"setup": prompt, "check": test, "function": name})
        except AnswerFault as fault:
            return Score(0.0, str(fault))
    return Score(1.0, "correct") if verdict == "passed" else Score(0.0, verdict)


def _relay(candidate: Session, tests: Session, name: str, request: dict[str, Any]) -> str:
    """Carry the calls of the test process to the candidate's and the values back, as data, until the verdict.

    What the test process does before it has seen a value of the candidate's cannot be the answer's fault.
    """
    message: dict[str, Any] = {"nonce": secrets.token_hex(8), **request}
    for num_calls in range(MAX_TEST_CALLS):
        try:
            reply = tests.exchange(message)
        except AnswerFault as fault:
            if num_calls == 0:
                raise SandboxFailure(f"the tests did not run: {fault}") from fault
            raise
        if "call" not in reply:
            if "value" in reply:
                return str(reply["value"])
            failure = f"the tests did not run: {reply.get('error')}"
            raise AnswerFault(failure) if num_calls else SandboxFailure(failure)
        try:
            value = {"value": candidate.ask({"call": reply["call"], "function": name})}
        except AnswerFault as fault:
            return str(fault)
        message = {"nonce": message["nonce"], **value}
    raise AnswerFault(f"more than {MAX_TEST_CALLS} calls")
