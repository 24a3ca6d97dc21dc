"""The one door to grading: a task and an answer in, a score or "could not be checked" out.

Called by the judge_filter, online_rl and evaluate stages, from any thread. A broken sandbox never becomes a score of
zero, nor does a bad task.
"""

from __future__ import annotations

from typing import get_args

from rewards.code_tests import grade_code, grade_humaneval
from rewards.instruction import grade_form
from rewards.math_answer import grade_number
from rewards.sandbox import Sandbox, SandboxFailure
from rewards.task import BadTask, Score, Task, Ungraded, Verifier
from rewards.text_answer import grade_text


def grade(task: Task, text: str, sandbox: Sandbox) -> Score | Ungraded:
    """What `text` earns as an answer to `task`. BadTask where the task's verifier or check is wrong.

    `sandbox` is started; only the "code", "humaneval" and (for answers that are no plain numbers) "number" verifiers
    use it.
    """
    try:
        match task.verifier:
            case "number":
                return grade_number(task, text, sandbox)
            case "text":
                return grade_text(task, text)
            case "form":
                return grade_form(task, text)
            case "code":
                return grade_code(task, text, sandbox)
            case "humaneval":
                return grade_humaneval(task, text, sandbox)
    except SandboxFailure as failure:
        return Ungraded(f"sandbox: {failure}")
    raise BadTask(f"task {task.task_id}: no verifier {task.verifier!r}; there are {', '.join(get_args(Verifier))}")
