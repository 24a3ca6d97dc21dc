"""The "number" verifier: is the final answer equal to the expected one? `rewards/grade.py` calls `grade_number`.

Plain numbers are compared exactly and at once. Anything else goes to math-verify, whose own time limit (a signal, which
works in main threads only and else fails every answer) is off: it runs in the sandbox, where a hang can be killed, and
where it matters little that sympy evaluates text.
"""

from __future__ import annotations

import re
from fractions import Fraction

from rewards.sandbox import AnswerFault, Sandbox
from rewards.task import Score, Task, Ungraded
from rewards.text_answer import NO_FINAL_ANSWER, after_last

MARKERS = ("Answer:", "####")
PLAIN_NUMBER = re.compile(r"([-+]?)\$?([-+]?)((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)\s?%?")
ONE_NUMBER = re.compile(r"\D*\d[\d,]*(?:\.\d+)?\D*")
MAX_ANSWER_CHARS = 400  # a longer "final answer" is none
SAME_NUMBER = r"""
from math_verify import parse, verify

def same(gold, texts):
    expected = parse(gold, parsing_timeout=None)
    return any(verify(expected, parse(text, parsing_timeout=None), timeout_seconds=None) for text in texts)
"""


def plain_number(text: str) -> Fraction | None:
    """The exact value of an integer or decimal, written with or without thousands commas, $, % or a last full stop.

    >>> plain_number("$1,234.50."), plain_number("1/2")
    (Fraction(2469, 2), None)
    """
    match = PLAIN_NUMBER.fullmatch(text.strip().removesuffix(".").replace("−", "-"))
    if match is None or (match[1] and match[2]):
        return None
    return Fraction(match[1] + match[2] + match[3].replace(",", ""))


def grade_number(task: Task, text: str, sandbox: Sandbox) -> Score | Ungraded:
    """1.0 if the first line after the last "Answer:" or "####" equals `task.check["answer"]`; else 0.0."""
    rest = after_last(text, MARKERS)
    if rest is None:
        return NO_FINAL_ANSWER
    answer, wanted = rest.strip().splitlines()[0].strip(), str(task.check["answer"]).strip()
    if len(answer) > MAX_ANSWER_CHARS:
        return Score(0.0, f"a final answer of {len(answer)} characters")
    if answer == wanted:
        return Score(1.0, "correct")
    expected, given = plain_number(wanted), plain_number(answer)
    if expected is not None and given is not None:
        same = expected == given
    elif not re.search(r"[\d\\a-zA-Z]", answer):
        same = False
    else:
        # As LaTeX, and as prose; prose with several numbers is not read, since the last one would count and any
        # "12 or 13" would be right.
        texts = [f"${answer}$", answer] if ONE_NUMBER.fullmatch(answer) else [f"${answer}$"]
        try:
            (same,) = sandbox.run(SAME_NUMBER, "same", [[f"${wanted}$", texts]], library="math")
        except AnswerFault as fault:
            return Ungraded("math-verify timeout" if "time limit" in str(fault) else f"math-verify: {fault}")
    return Score(1.0, "correct") if same else Score(0.0, f"got {answer[:60]!r}")
