"""What a judge is asked.

Called by `judges.client`. The rubric comes first and is the same for every question, so that an engine with a prefix
cache computes it once; the answer is begun for the judge, so that its very next token is the rating.
"""

from __future__ import annotations

from dataclasses import dataclass

# Longer than one of the engine's cache blocks (128 tokens on a CPU), without which nothing of it would be cached.
RUBRIC = """You rate how difficult a task is for a beginner, from 1 to 5.
1: one thing to do. 2: two things to do. 3: three or four things to do. 4: five or six things to do. \
5: seven things to do, or more.
Count every number, operation, swap, sentence and condition in the task. To add two numbers is one thing to do, so it \
is 1. To swap two cups and then two others is two things to do, so it is 2. To list three words in order of the \
alphabet is three things to do, so it is 3. A long task with many numbers, swaps or conditions is 5."""

ANSWER_PREFIX = "Difficulty: "


@dataclass(frozen=True, slots=True)
class JudgePrompt:
    """Chat messages, and the first words of the answer; the next token is one of `judges.verdict.LABELS`."""

    messages: tuple[dict[str, str], ...]
    answer_prefix: str


def render(question: str) -> JudgePrompt:
    """Ask for the difficulty of `question`, whole and unaltered."""
    system = {"role": "system", "content": RUBRIC}
    user = {"role": "user", "content": f"Task:\n{question}\n\nHow difficult is this task, from 1 to 5?"}
    return JudgePrompt((system, user), ANSWER_PREFIX)
