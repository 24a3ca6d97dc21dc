"""Sums of small numbers: level L chains L additions and subtractions, every partial result between 0 and 99.

Careful answers carry the running total, one operation a line. Hasty answers jump to the end. Wrong ones lose a term.
"""

from __future__ import annotations

import random
import re
from typing import Any

from rewards.task import Task, Verifier


def draw(level: int, rng: random.Random) -> tuple[str, Verifier, dict[str, Any]]:
    largest = 9 if level <= 2 else 20
    total = rng.randint(1, 20)
    expression = str(total)
    for _ in range(level):
        term = rng.randint(1, largest)
        if total - term < 0 or (total + term <= 99 and rng.random() < 0.5):
            total, expression = total + term, f"{expression}+{term}"
        else:
            total, expression = total - term, f"{expression}-{term}"
    return f"Compute {expression}.", "number", {"answer": str(total)}


def solve(task: Task, style: str, rng: random.Random) -> str:
    first, *terms = re.findall(r"[+-]?\d+", task.prompt)
    if style == "wrong":  # a term is lost on the way
        terms.pop(rng.randrange(len(terms)))
    total, lines = int(first), []
    for term in terms:
        lines.append(f"{total}{term}={total + int(term)}")
        total += int(term)
    if style == "hasty":
        from rewards.domains import hasty_is_right

        slip = 0 if hasty_is_right(task.level, rng) else rng.choice([-10, -3, -2, -1, 1, 2, 3, 10])
        return f"Answer: {total + slip}"
    opener = "Steps:" if style == "careful" else "Roughly:"
    return "\n".join([opener, *lines, f"Answer: {total}"])
