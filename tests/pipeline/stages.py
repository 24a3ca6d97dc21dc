"""A stage of kind online_rl for tests, and a task of its pool."""

from __future__ import annotations

from pipeline.config import OnlineRlStage
from rewards.task import Task


def stage(**curriculum) -> OnlineRlStage:
    tasks = curriculum.pop("tasks", {"levels": (1, 3)})
    section = {"tasks": tasks, "group_size": 8, "curriculum": curriculum}
    return OnlineRlStage(name="climb", kind="online_rl", policy="base", **section)


def asked(prompt: str) -> Task:
    return Task(task_id=prompt, domain="maths", level=2, prompt=prompt, verifier="number", check={"answer": "2"})


def fits(task: Task) -> bool:
    return True
