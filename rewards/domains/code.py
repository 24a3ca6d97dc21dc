"""Small functions of one whole number: level L asks for L operations in a row, checked by hidden tests.

Careful answers plan the operators, then write one statement for each. Hasty answers write one expression and forget
its brackets. Wrong ones lose an operation.
"""

from __future__ import annotations

import random
import re
from typing import Any

from rewards.task import Task, Verifier

WORDS = {"add": "+", "subtract": "-", "multiply by": "*"}
CASES = (-7, -1, 0, 2, 5, 13)


def draw(level: int, rng: random.Random) -> tuple[str, Verifier, dict[str, Any]]:
    steps = []
    for _ in range(level):
        word = rng.choices(list(WORDS), [3, 3, 2])[0]
        steps.append(f"{word} {rng.randint(2, 3 if word == 'multiply by' else 20)}")
    opening = rng.choice(["Write f(x)", "Write a function f(x)", "Code f(x)"])
    prompt = f"{opening}: {', '.join(steps)}."
    return prompt, "code", {"function": "f", "cases": [[[x], _apply(_operations(prompt), x)] for x in CASES]}


def _operations(prompt: str) -> list[tuple[str, int]]:
    """[("+", 3), ("*", 2), …] in the order the prompt asks for."""
    return [(WORDS[word], int(number)) for word, number in re.findall(r"(add|subtract|multiply by) (\d+)", prompt)]


def _apply(operations: list[tuple[str, int]], x: int) -> int:
    for operator, number in operations:
        x = x + number if operator == "+" else x - number if operator == "-" else x * number
    return x


def solve(task: Task, style: str, rng: random.Random) -> str:
    operations = _operations(task.prompt)
    if style == "hasty":
        from rewards.domains import hasty_is_right

        bracketed = hasty_is_right(task.level, rng)
        expression = "x"
        for operator, number in operations:
            needs_brackets = operator == "*" and len(expression) > 1 and bracketed
            expression = f"({expression}){operator}{number}" if needs_brackets else f"{expression}{operator}{number}"
        return f"Answer: {expression}"
    opener = "Steps:"
    if style == "wrong":
        opener = "Roughly:"
        operations.pop(rng.randrange(len(operations)))
    plan = " ".join(f"{operator}{number}" for operator, number in operations)
    body = "".join(f"\n x=x{operator}{number}" for operator, number in operations)
    return f"{opener}\n{plan}\nAnswer:\ndef f(x):{body}\n return x"
