"""Finding the final answer in a text, and the "text" verifier: exact match but for case and spaces.

`rewards/grade.py` calls `grade_text`; the other verifiers share `after_last`. What stands before the last marker is
reasoning and is never graded; an answer without a marker has no final answer and earns nothing.
"""

from __future__ import annotations

from rewards.task import Score, Task

NO_FINAL_ANSWER = Score(0.0, "no final answer")


def after_last(text: str, markers: tuple[str, ...] = ("Answer:",)) -> str | None:
    """What follows the last of any of `markers` in `text`, unchanged; None if there is none or only blanks follow."""
    ends = [text.rfind(marker) + len(marker) for marker in markers if marker in text]
    rest = text[max(ends) :] if ends else ""
    return rest if rest.strip() else None


def grade_text(task: Task, text: str) -> Score:
    """1.0 if the final answer is `task.check["answer"]`, whatever the case and spacing; else 0.0."""
    answer = after_last(text)
    if answer is None:
        return NO_FINAL_ANSWER
    got, wanted = ("".join(part.split()).casefold() for part in (answer, str(task.check["answer"])))
    return Score(1.0, "correct") if got == wanted else Score(0.0, f"got {answer.strip()[:60]!r}")
