"""New tasks made of verified ones, whose answers follow from those that a verifier already holds. Nothing is guessed.

    combine   two number tasks       → both are to be solved, and their answers added or subtracted      a + b, a - b
    go_on     a number task          → its answer is to be changed by one more operation                 a · n, a + n
    extend    a code task, by cases  → the function is to do one more thing with its value           f(x) + n, f(x) · n
    wrap      a HumanEval task       → the function is to return its value in a list; the old tests see what is inside

Each is a function (parents, random numbers) → task or None, where None says that it does not apply to these. A mutated
task is a level harder than the hardest of its parents, where theirs are known; its `task_id` names the mutation, them
and the prompt's digest.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from rewards.math_answer import plain_number
from rewards.task import UNKNOWN_LEVEL, Task, Verifier

Mutation = Callable[[Sequence[Task], random.Random], Task | None]
MAX_FACTOR, MAX_TERM = 5, 20


def combine(parents: Sequence[Task], rng: random.Random) -> Task | None:
    first, second = parents[:2]
    one, other = _number(first), _number(second)
    if one is None or other is None or first.prompt == second.prompt:
        return None
    word, value = rng.choice([("plus", one + other), ("minus", one - other)])
    prompt = (
        f"Solve two problems.\n1. {first.prompt.strip()}\n2. {second.prompt.strip()}\n"
        f"Give the answer to the first {word} the answer to the second."
    )
    return _mutated("combine", parents[:2], prompt, "number", {"answer": written(value)})


def go_on(parents: Sequence[Task], rng: random.Random) -> Task | None:
    value = _number(parents[0])
    if value is None:
        return None
    factor, term = rng.randint(2, MAX_FACTOR), rng.randint(1, MAX_TERM)
    words, result = rng.choice(
        [(f"multiply it by {factor}", value * factor), (f"add {term} to it", value + term),
         (f"subtract it from {term}", term - value)]
    )  # fmt: skip
    prompt = f"{parents[0].prompt.strip()}\nTake the answer to this and {words}. Give only the final result."
    return _mutated("go_on", parents[:1], prompt, "number", {"answer": written(result)})


def extend(parents: Sequence[Task], rng: random.Random) -> Task | None:
    parent = parents[0]
    if parent.verifier != "code" or not all(_is_int(expected) for _, expected in parent.check["cases"]):
        return None
    factor, term = rng.randint(2, MAX_FACTOR), rng.randint(1, MAX_TERM)
    words, change = rng.choice(
        [(f"multiply by {factor}", lambda value: value * factor), (f"add {term}", lambda value: value + term)]
    )
    cases = [[arguments, change(expected)] for arguments, expected in parent.check["cases"]]
    prompt = f"{parent.prompt.strip().removesuffix('.')}, {words}."
    return _mutated("extend", parents[:1], prompt, "code", parent.check | {"cases": cases})


def wrap(parents: Sequence[Task], rng: random.Random) -> Task | None:
    parent = parents[0]
    if parent.verifier != "humaneval":
        return None
    change = f"But let {parent.check['entry_point']} return a list that holds this value alone."
    if change in parent.prompt:  # said twice it would still ask for one list
        return None
    prompt = f"{parent.prompt.strip()}\n{change}"
    # The old tests, of a candidate that insists on the list and hands on what is inside.
    test = f"""{parent.check["test"]}

def check(candidate, _check_value=check):
    def value(*args, **kwargs):
        held = candidate(*args, **kwargs)
        assert isinstance(held, list) and len(held) == 1, "a list of one value was asked for"
        return held[0]
    _check_value(value)
"""
    return _mutated("wrap", parents[:1], prompt, "humaneval", parent.check | {"test": test})


MUTATIONS: dict[str, Mutation] = {"combine": combine, "go_on": go_on, "extend": extend, "wrap": wrap}
PARENTS = {"combine": 2}  # all others: 1


def written(value: Fraction) -> str:
    """Exactly, as the verifier reads it.

    >>> written(Fraction(-7)), written(Fraction(5, 4))
    ('-7', '1.25')
    """
    if value.denominator == 1:
        return str(value.numerator)
    digits = 0
    while (value * 10**digits).denominator != 1:  # ends: it was read from a decimal
        digits += 1
    scaled = abs(value.numerator) * 10**digits // value.denominator
    whole, part = divmod(scaled, 10**digits)
    return f"{'-' if value < 0 else ''}{whole}.{part:0{digits}}"


def _number(task: Task) -> Fraction | None:
    return plain_number(str(task.check["answer"])) if task.verifier == "number" else None


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _mutated(
    mutation: str, parents: Sequence[Task], prompt: str, verifier: Verifier, check: dict[str, Any]
) -> Task:  # fmt: skip
    digest = hashlib.sha256(prompt.encode()).hexdigest()[:8]
    return Task(
        task_id=f"{mutation}({', '.join(parent.task_id for parent in parents)})#{digest}", domain=parents[0].domain,
        level=_above(parents), prompt=prompt, verifier=verifier, check=check,
    )  # fmt: skip


def _above(parents: Sequence[Task]) -> int:
    levels = [parent.level for parent in parents]
    return UNKNOWN_LEVEL if UNKNOWN_LEVEL in levels else max(levels) + 1
