"""Answers to reasoning-gym's problems in small steps, from the prompt alone: what is taught before RL.

Its data sets give a result and no way to it. A tiny model that is taught results alone can only guess the likeliest.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Callable, Iterator


def worked(data_set: str, prompt: str, answer: str) -> str:
    """Steps, one a line, and the line of the answer; data sets without steps here get that line alone."""
    steps = STEPS.get(data_set)
    lines = list(steps(prompt.rpartition("\n")[0])) if steps else []
    return "\n".join([*lines, f"Answer: {answer}"])


def chain_sum(prompt: str) -> Iterator[str]:
    first, *terms = re.findall(r"[+-]?\s*\d+", prompt.rpartition(":")[2])
    total = int(first)
    for term in terms:
        before, total = total, total + int(term.replace(" ", ""))
        yield f"{before} {term[0]} {term[1:].strip()} = {total}"


def products(prompt: str) -> Iterator[str]:
    factors = [int(word) for word in re.findall(r"\d+", prompt)]
    for before, factor in zip(itertools.accumulate(factors, operator.mul), factors[1:]):
        yield f"{before} * {factor} = {before * factor}"


def gcd(prompt: str) -> Iterator[str]:
    """Euclid's algorithm, one number after the other."""
    common, *others = [int(word) for word in re.findall(r"\d+", prompt)]
    for other in others:
        while other:
            yield f"{common} mod {other} = {common % other}"
            common, other = other, common % other


def letter_counting(prompt: str) -> Iterator[str]:
    """Each word with the count so far."""
    letter, text = re.findall(r'"([^"]*)"', prompt)
    so_far = 0
    for word in text.split():
        so_far += word.lower().count(letter.lower())
        yield f"{word} {so_far}"


def spell_backward(prompt: str) -> Iterator[str]:
    word = prompt.rpartition(":")[2].strip()
    yield " ".join(word)
    yield " ".join(reversed(word))


def count_bits(prompt: str) -> Iterator[str]:
    """Halves, each with the bits so far."""
    number, so_far = int(re.findall(r"\d+", prompt)[-1]), 0
    while number:
        so_far += number % 2
        yield f"{number} {so_far}"
        number //= 2


STEPS: dict[str, Callable[[str], Iterator[str]]] = {
    step.__name__: step for step in (chain_sum, products, gcd, letter_counting, spell_backward, count_bits)
}
