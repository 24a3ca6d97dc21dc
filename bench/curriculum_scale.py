"""The curriculum on large pools: memory, and milliseconds to plan a step and to learn from it.

    python bench/curriculum_scale.py [--prompts 1000000] [--steps 50]

A data set's prompts in four domains of ten levels; each step asks for 64 groups, and its groups pass as often as their
level says. Thompson sampling toward the band, in three sizes of pool so that the growth is seen; the times are medians
with quartiles, the memory is what the process grew by, and what a state takes on disk.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from types import SimpleNamespace
from typing import Annotated, cast

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pinned_run
import psutil
import typer
from rich.console import Console
from rich.table import Table

from pipeline.config import OnlineRlStage
from pipeline.stage import StageContext
from pipeline.task_pool import Pool, curriculum_of
from rewards.task import Task
from rl.curriculum import Curriculum
from rl.gates import Outcome

DOMAINS, LEVELS, GROUPS, SIZE = ("maths", "code", "reasoning", "dialogue"), 10, 64, 16


def curriculum(prompts: int) -> Curriculum:
    """The recipe's defaults."""
    cells = {f"p{i}": (DOMAINS[i % len(DOMAINS)], 1 + i // len(DOMAINS) % LEVELS) for i in range(prompts)}
    stage = OnlineRlStage.model_validate(
        {"name": "climb", "kind": "online_rl", "policy": "none", "group_size": SIZE,
         "tasks": {"dataset": "none", "format": "gsm8k"}}
    )  # fmt: skip
    task = Task(task_id="any", domain="maths", level=1, prompt="", verifier="number", check={"answer": "0"})
    pool = Pool(cells=cells, task_of=lambda *_: task, tasks=dict.fromkeys(cells, task))
    context = cast(StageContext, SimpleNamespace(inputs={}, seed=1))
    return curriculum_of(stage, pool, context, fits=lambda task: True)


def measured(prompts: int, steps: int) -> list[str]:
    process = psutil.Process()
    before = process.memory_info().rss
    made = curriculum(prompts)
    rng = np.random.default_rng(1)
    planning, learning = [], []
    for step in range(steps):
        begin = time.perf_counter()
        turns = made.plan(range(step * GROUPS, (step + 1) * GROUPS))
        planned = time.perf_counter()
        choices = [choice for (choice,) in turns]
        outcomes = [
            Outcome(
                slot=slot, turn=0, choice=choice, passes=int(rng.binomial(SIZE, 1 - _level(made, choice.entry) / 10)),
                total=SIZE, version=step, answers=SIZE, tokens=800, trained_tokens=800, kept=True,
            )
            for slot, choice in enumerate(choices)
        ]  # fmt: skip
        begun = time.perf_counter()
        made.learn(step + 1, outcomes, choices)
        planning.append((planned - begin) * 1e3)
        learning.append((time.perf_counter() - begun) * 1e3)
    grown = (process.memory_info().rss - before) / 2**20
    state = len(json.dumps(made.state())) / 2**20
    return [f"{prompts:,}", f"{grown:,.0f}", f"{state:.2f}", _spread(planning[1:]), _spread(learning[1:])]


def _level(made: Curriculum, entry: str) -> int:
    return made.entries.cells[made.entries.cell[made.entries.id_of[entry]]][1]


def _spread(numbers: list[float]) -> str:
    low, middle, high = statistics.quantiles(numbers, n=4)
    return f"{middle:.1f} ({low:.1f}–{high:.1f})"


def main(
    prompts: Annotated[int, typer.Option(help="Of the largest pool.")] = 1_000_000,
    steps: Annotated[int, typer.Option(help="Steps to take the median of.")] = 50,
) -> None:
    """Measure and print one table."""
    table = Table(
        "prompts", "MiB", "state on disk, MiB", "plan, ms a step", "learn, ms a step",
        title=f"thompson, {GROUPS} groups a step, one thread",
    )  # fmt: skip
    for number in sorted({max(1000, prompts // 100), max(1000, prompts // 10), prompts}):
        table.add_row(*measured(number, steps))
    Console(width=110).print(table)
    print(pinned_run.circumstances())


if __name__ == "__main__":
    typer.run(main)
