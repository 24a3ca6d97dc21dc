"""Where generated tasks come from: (domain, level 1–10, seed, split) → task, and how people of three tempers answer it.

Every domain module has two functions. `draw(level, rng)` returns the prompt, the verifier's name and what the verifier
needs. `solve(task, style, rng)` answers it: *careful* works step by step and is right; *hasty* blurts an answer, right
less and less often as the level rises; *wrong* follows a sloppy method. A base model trained on the mix has the right
behaviour in it, but not on top, as real base models have.

A prompt's side of the train/held-out wall follows from its text alone (`rewards.task.split_of`), so no training seed
can draw a held-out prompt.
"""

from __future__ import annotations

import random
from typing import Any, Literal, Protocol, cast

from rewards.domains import code, dialogue, maths, reasoning
from rewards.task import Split, Task, Verifier, split_of

Style = Literal["careful", "hasty", "wrong"]
STYLES: tuple[Style, ...] = ("careful", "hasty", "wrong")
LEVELS = range(1, 11)
MAX_DRAWS = 2000  # a domain whose level has too few prompts on one side of the wall fails loudly instead of looping


class Domain(Protocol):
    def draw(self, level: int, rng: random.Random) -> tuple[str, Verifier, dict[str, Any]]: ...
    def solve(self, task: Task, style: Style, rng: random.Random) -> str: ...


DOMAINS: dict[str, Domain] = {
    name: cast(Domain, module)
    for name, module in {"maths": maths, "code": code, "reasoning": reasoning, "dialogue": dialogue}.items()
}


def generate(domain: str, level: int, seed: int, split: Split) -> Task:
    """The task of a (domain, level, seed) on one side of the wall; the same arguments give the same task."""
    rng = random.Random(f"{domain}/{level}/{split}/{seed}")
    for _ in range(MAX_DRAWS):
        prompt, verifier, check = DOMAINS[domain].draw(level, rng)
        if split_of(prompt) == split:
            task_id = f"{_prefix(domain, level)}{split}/{seed}"
            return Task(task_id=task_id, domain=domain, level=level, prompt=prompt, verifier=verifier, check=check)
    raise RuntimeError(f"{domain} level {level}: no {split} prompt in {MAX_DRAWS} draws; widen the domain's draw()")


def is_generated(task: Task) -> bool:
    """Whether `generate` made it, and its level is one of ours."""
    return task.domain in DOMAINS and task.task_id.startswith(_prefix(task.domain, task.level))


def _prefix(domain: str, level: int) -> str:
    return f"{domain}/{level}/"


def worked_solution(task: Task, style: Style, rng: random.Random) -> str:
    """An answer to a generated task as a person of that temper would write it, ending in `Answer: …`."""
    return DOMAINS[task.domain].solve(task, style, rng)


def hasty_is_right(level: int, rng: random.Random) -> bool:
    """Whether a hasty answer happens to be right: nearly always at level 1, hardly ever from level 7 on."""
    return rng.random() < max(0.02, 1.0 - 0.18 * (level - 1) - 0.02)
