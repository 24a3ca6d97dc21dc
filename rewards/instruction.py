"""The "form" verifier: does the final answer obey every stated constraint on its form?

`rewards/grade.py` calls `grade_form`; `rewards/domains/dialogue.py` writes the constraints. A constraint is a dict
{"kind": ..., one parameter}; the kinds and their parameters are the table `CONSTRAINTS`. Words are the answer, without
one last mark, split at the separator that the task's own "separator" constraint names, else at blanks. Letters are
compared without regard to case, except by "case" itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rewards.task import BadTask, Score, Task
from rewards.text_answer import NO_FINAL_ANSWER, after_last

END_MARKS = ".!?"  # one at the end of an answer is no part of its last word
Check = Callable[[str, list[str], Any], bool]  # (answer, its words, the parameter) -> holds


def _same(one: str, other: str) -> bool:
    return one.casefold() == other.casefold()


def _folded(words: list[str]) -> list[str]:
    return [word.casefold() for word in words]


# kind -> (the name of its parameter, None if it has none; the check)
CONSTRAINTS: dict[str, tuple[str | None, Check]] = {
    "word_count": ("n", lambda text, words, n: len(words) == n),
    "case": ("case", lambda text, words, case: text.isupper() if case == "upper" else text.islower()),
    "separator": ("text", lambda text, words, separator: all(word.isalnum() for word in words)),
    "starts_with": ("letter", lambda text, words, letter: all(_same(word[:1], letter) for word in words)),
    "ends_with": ("text", lambda text, words, ending: text.endswith(ending)),
    "contains": ("word", lambda text, words, word: word.casefold() in _folded(words)),
    "excludes": ("letter", lambda text, words, letter: letter.casefold() not in text.casefold()),
    "sorted": (None, lambda text, words, _: _folded(words) == sorted(_folded(words))),
    "distinct": (None, lambda text, words, _: len(set(_folded(words))) == len(words)),
    "word_length": ("n", lambda text, words, n: all(len(word) == n for word in words)),
    "from_list": ("words", lambda text, words, allowed: set(_folded(words)) <= set(_folded(allowed))),
    "last_word": ("word", lambda text, words, word: _same(words[-1], word)),
    "first_word": ("word", lambda text, words, word: _same(words[0], word)),
}


def grade_form(task: Task, text: str) -> Score:
    """1.0 if all of `task.check["constraints"]` hold for what follows the last "Answer:"; else 0.0 and the reason
    names the first that fails. BadTask for a task with no, an unknown or an incomplete constraint."""
    constraints = task.check["constraints"]
    if not constraints:
        raise BadTask(f"task {task.task_id}: no constraints, so any answer would pass")
    for constraint in constraints:
        kind = constraint["kind"]
        if kind not in CONSTRAINTS:
            raise BadTask(f"task {task.task_id}: no constraint kind {kind!r}; there are {', '.join(CONSTRAINTS)}")
        parameter = CONSTRAINTS[kind][0]
        if parameter is not None and parameter not in constraint:
            raise BadTask(f"task {task.task_id}: constraint {kind!r} needs {parameter!r}")

    answer = after_last(text)
    if answer is None:
        return NO_FINAL_ANSWER
    answer = answer.strip()
    separator = next((one["text"] for one in constraints if one["kind"] == "separator"), None)
    words = answer.removesuffix(answer[-1] if answer[-1] in END_MARKS else "").split(separator) or [""]
    for constraint in constraints:
        parameter, holds = CONSTRAINTS[constraint["kind"]]
        value = constraint[parameter] if parameter else None
        if not holds(answer, words, value):
            return Score(0.0, f"{constraint['kind']} {'' if value is None else value}".strip() + " does not hold")
    return Score(1.0, "correct")
