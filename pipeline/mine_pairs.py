"""Graded rollouts in, preference pairs out: which answers the dpo stage compares.

Called by `pipeline/dpo.py`. Pure: no files, no tensors, no randomness. Every group of the window ends either in one
pair or in one counted reason, so `len(pairs) + sum(dropped.values())` is the number of groups.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any, Literal

Category = Literal["truncated", "format", "wrong"]
CORNER_ORDER: tuple[Category, ...] = ("truncated", "format", "wrong")  # the rarer the failure, the earlier it is taken
FULL_SCORE = 1.0  # what is preferred must be right, not merely better
MIN_MARGIN = 0.5  # a near miss against a hit teaches noise
# How a grader's reason begins when it found nothing to grade: no final answer, or no program that Python can read.
FORMAT_REASONS = (
    "no final answer", "a final answer of ", "SyntaxError", "IndentationError", "TabError", "NameError: no function",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two answers to one prompt, sampled together. Ids are the engine's own, end of turn included."""

    task_id: str
    domain: str
    level: int
    group_id: str
    step: int  # optimiser step that consumed the group
    category: Category  # what is wrong with the rejected answer
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    chosen_text: str
    rejected_text: str
    chosen_score: float
    rejected_score: float
    rejected_reason: str

    @property
    def length_gap(self) -> float:
        """|log(chosen length / rejected length)|: 0 where both are equally long."""
        return abs(math.log(len(self.chosen_ids) / len(self.rejected_ids)))

    @property
    def rank(self) -> tuple[int, int, float]:
        """Corner cases first, then what is nearest to the policy, then the most alike in length."""
        return (CORNER_ORDER.index(self.category), -self.step, self.length_gap)


@dataclass(frozen=True, slots=True)
class MinedPairs:
    pairs: list[Pair]
    dropped: dict[str, int]  # reason → groups that gave no pair
    num_groups: int  # groups in the window of the last steps
    num_ungraded: int  # answers of those groups that nobody could grade; never used


def mine_pairs(
    rollouts: Iterable[Mapping[str, Any]],
    *,
    last_steps: int,
    max_length_ratio: float,
    max_tokens: int,
    max_pairs: int,
) -> MinedPairs:
    """At most `max_pairs` pairs, one a task, domains in turn, corner cases first.

    `rollouts` are rows of rollouts.parquet. Chosen and rejected differ in length by no more than `max_length_ratio`,
    and prompt and answer together hold at most `max_tokens` tokens.
    """
    rows = list(rollouts)
    newest = max((row["step"] for row in rows), default=0)
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["step"] > max(0, newest - last_steps):  # 0: of no step, discarded or lost
            groups[row["group_id"]].append(row)

    dropped: Counter[str] = Counter()
    best_of_task: dict[str, Pair] = {}
    for group_id in sorted(groups):
        pair = _pair_of_group(groups[group_id], max_length_ratio, max_tokens)
        if isinstance(pair, str):
            dropped[pair] += 1
            continue
        rival = best_of_task.get(pair.task_id)
        dropped["same_task"] += rival is not None
        if rival is None or pair.rank < rival.rank:
            best_of_task[pair.task_id] = pair

    candidates = _domains_in_turn(best_of_task.values())
    dropped["over_max_pairs"] += len(candidates[max_pairs:])
    return MinedPairs(
        pairs=candidates[:max_pairs],
        dropped={reason: count for reason, count in dropped.items() if count},
        num_groups=len(groups),
        num_ungraded=sum(row["score"] is None for group in groups.values() for row in group),
    )


def _pair_of_group(group: Sequence[Mapping[str, Any]], max_length_ratio: float, max_tokens: int) -> Pair | str:
    """The group's best pair, or the reason why it has none."""
    graded = [row for row in group if row["score"] is not None and row["answer_ids"]]
    chosen = [row for row in graded if row["score"] >= FULL_SCORE and row["finish_reason"] != "length"]
    if not chosen:
        return "no_full_score"
    rejected = [row for row in graded if row["score"] <= FULL_SCORE - MIN_MARGIN]
    if not rejected:
        return "no_clear_failure"
    pairs = [_pair(good, bad) for good in chosen for bad in rejected]
    pairs = [pair for pair in pairs if pair.length_gap <= math.log(max_length_ratio) + 1e-9]
    if not pairs:
        return "length_ratio"
    pairs = [pair for pair in pairs if _longest(pair) <= max_tokens]
    if not pairs:
        return "too_long"
    return min(pairs, key=lambda pair: pair.rank)


def _pair(good: Mapping[str, Any], bad: Mapping[str, Any]) -> Pair:
    return Pair(
        task_id=good["task_id"],
        domain=good["domain"],
        level=good["level"],
        group_id=good["group_id"],
        step=good["step"],
        category=categorise(bad["finish_reason"], bad["reason"]),
        prompt_ids=list(good["prompt_ids"]),
        chosen_ids=list(good["answer_ids"]),
        rejected_ids=list(bad["answer_ids"]),
        chosen_text=good["text"],
        rejected_text=bad["text"],
        chosen_score=good["score"],
        rejected_score=bad["score"],
        rejected_reason=bad["reason"],
    )


def categorise(finish_reason: str, reason: str) -> Category:
    """What is wrong with a failed answer: it never ended, it broke the form a grader reads, or it is wrong."""
    if finish_reason == "length":
        return "truncated"
    if reason.startswith(FORMAT_REASONS):
        return "format"
    return "wrong"


def _longest(pair: Pair) -> int:
    return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))


def _domains_in_turn(pairs: Iterable[Pair]) -> list[Pair]:
    """All pairs, one of each domain after the other, so that a cut at any length leaves the domains in balance."""
    by_domain: dict[str, list[Pair]] = defaultdict(list)
    for pair in sorted(pairs, key=lambda pair: (pair.rank, pair.task_id)):
        by_domain[pair.domain].append(pair)
    rounds = zip_longest(*(by_domain[domain] for domain in sorted(by_domain)))
    return [pair for pair in chain.from_iterable(rounds) if pair is not None]
