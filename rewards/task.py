"""A task, an answer, a score: the three words every room above shares.

A *task* is a prompt with its domain, level and way to check an answer. A *score* is what an answer earned. An
*ungraded* answer could not be checked (the sandbox died, a judge was unreadable): that is its own value, never 0.
No tensors here, and nothing heavier than the standard library.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Literal

Split = Literal["train", "held_out"]
Verifier = Literal["number", "text", "code", "humaneval", "form"]
UNKNOWN_LEVEL = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One prompt and how to check an answer to it.

    >>> Task(task_id="maths/3/17", domain="maths", level=3, prompt="7+5-3", verifier="number", check={"answer": "9"})
    """

    task_id: str
    domain: str
    level: int  # 1 (easiest) to 10; UNKNOWN_LEVEL where a data set states none
    prompt: str  # what the user turn says
    verifier: Verifier  # which checker in `rewards` reads `check`
    check: dict[str, Any] = field(default_factory=dict)  # JSON: the answer, hidden tests or constraints


@dataclass(frozen=True, slots=True)
class Score:
    """What an answer earned, in [0, 1], and the reason in a few words."""

    value: float
    reason: str


@dataclass(frozen=True, slots=True)
class Ungraded:
    """The answer could not be checked, through no fault of its own. Counted by `reason`, never scored."""

    reason: str


class BadTask(ValueError):
    """A task whose verifier or check is wrong: no answer to it can be graded. Names the task."""


def split_of(prompt: str) -> Split:
    """The side of the wall a prompt stands on. A function of its text alone, so that no seed can draw a held-out
    prompt for training: one prompt in five is held out."""
    return "held_out" if hashlib.sha256(prompt.encode()).digest()[0] < 51 else "train"
