"""Keeping track: cups in a row change places, level L swaps L pairs, and the final order is asked for.

Careful answers write the whole row after every swap. Hasty answers guess the final row. Wrong ones skip a swap.
"""

from __future__ import annotations

import random
import re
from typing import Any

from rewards.task import Task, Verifier

LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
TURNS = "abcdefghij"  # the turns have names, since the same swap may come twice


def draw(level: int, rng: random.Random) -> tuple[str, Verifier, dict[str, Any]]:
    size = 4 if level <= 5 else 5
    row = rng.sample(LETTERS, size)
    swaps: list[tuple[int, int]] = []
    while len(swaps) < level:
        pair = (lambda p: (min(p), max(p)))(rng.sample(range(1, size + 1), 2))
        if not swaps or swaps[-1] != pair:  # the same swap twice in a row would undo itself
            swaps.append(pair)
    turns = "".join(f"\n{name} {a}-{b}" for name, (a, b) in zip(TURNS, swaps, strict=False))
    prompt = f"Cups: {' '.join(row)}. Swap in turn:{turns}\nWhat is the order?"
    return prompt, "text", {"answer": " ".join(_rows(row, swaps)[-1])}


def _rows(row: list[str], swaps: list[tuple[int, int]]) -> list[list[str]]:
    """The row after each swap."""
    rows = []
    for a, b in swaps:
        row = list(row)
        row[a - 1], row[b - 1] = row[b - 1], row[a - 1]
        rows.append(row)
    return rows or [row]


def solve(task: Task, style: str, rng: random.Random) -> str:
    row = re.findall(r"[A-Z]", task.prompt.split(":")[1].split(".")[0])
    swaps = [(int(a), int(b)) for a, b in re.findall(r"(\d)-(\d)", task.prompt)]
    names = list(TURNS[: len(swaps)])
    if style == "wrong":
        skipped = rng.randrange(len(swaps))
        del swaps[skipped], names[skipped]
    rows = _rows(row, swaps)
    final = rows[-1]
    if style == "hasty":
        from rewards.domains import hasty_is_right

        if not hasty_is_right(task.level, rng):
            final = rng.sample(final, len(final))
        return f"Answer: {' '.join(final)}"
    opener = "Steps:" if style == "careful" else "Roughly:"
    lines = [f"{name} {a}-{b}: {' '.join(after)}" for name, (a, b), after in zip(names, swaps, rows, strict=False)]
    return "\n".join([opener, *lines, f"Answer: {' '.join(final)}"])
