"""The base model's corpus: generated tasks and their worked solutions, of three tempers.

A base model worth post-training has the right behaviour in it, but not on top. Most answers here are hasty or lose a
step; careful ones are a minority that shrinks with the level, and the high levels are rare altogether.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from rewards.domains import LEVELS, Style, generate, worked_solution

# How often each domain is drawn: arithmetic and tracking take a small model longest.
DOMAIN_WEIGHTS = {"maths": 0.4, "code": 0.15, "reasoning": 0.3, "dialogue": 0.15}
# How often each level is drawn, relative to the others: the last three are seen, but rarely.
LEVEL_WEIGHTS = (1.0, 1.0, 1.0, 1.0, 1.0, 0.9, 0.7, 0.4, 0.2, 0.1)


def careful_share(level: int) -> float:
    """How many answers of a level are careful: 37 % at level 1 falling to 10 % at level 10."""
    return 0.40 - 0.03 * level


WRONG_SHARE = 0.15  # answers that work step by step and lose one


def documents(seed: int) -> Iterator[tuple[str, str]]:
    """An endless stream of (prompt, answer)."""
    rng = random.Random(f"corpus/{seed}")
    domains, shares = list(DOMAIN_WEIGHTS), list(DOMAIN_WEIGHTS.values())
    while True:
        level = rng.choices(LEVELS, LEVEL_WEIGHTS)[0]
        task = generate(rng.choices(domains, shares)[0], level, rng.randrange(2**40), "train")
        careful = careful_share(level)
        styles: list[Style] = ["careful", "wrong", "hasty"]
        style = rng.choices(styles, [careful, WRONG_SHARE, 1 - careful - WRONG_SHARE])[0]
        yield task.prompt, worked_solution(task, style, rng)
