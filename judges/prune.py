"""Which prompts are kept, and why each one was or was not.

Called by `pipeline/judge_filter.py`. Promises: never more than the stated share is kept; no domain vanishes; a stated
share of what is kept is drawn at random from the easy half, for what a judge calls easy also teaches brevity; a prompt
that the judge could not rate is kept before a rated one, as far as the budget goes. The same seed decides the same.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from judges.verdict import JudgeFailure, Verdict

Group = Literal["hard", "easy_share", "unknown", "pruned", "pruned_unknown"]


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of one prompt."""

    kept: bool
    group: Group  # for counting
    reason: str  # for reading


def prune(
    replies: Sequence[Verdict | JudgeFailure],
    domains: Sequence[str],
    *,
    keep_at_most: float,
    keep_easy_share: float,
    seed: int,
) -> list[Decision]:
    """One decision per reply, in order.

    `domains[i]` is the domain of prompt i. floor(keep_at_most · n) prompts are kept, shared among domains by size. In
    each domain come first the easy share, drawn at random from its easier half; then the unrated prompts, drawn at
    random where they exceed what is left; then the rated ones from the hardest down, ties broken at random.
    """
    if not 0.0 < keep_at_most <= 0.5:
        raise ValueError(f"keep_at_most: {keep_at_most} is outside (0, 0.5]; at least half is always pruned")
    if not 0.0 <= keep_easy_share <= 1.0:
        raise ValueError(f"keep_easy_share: {keep_easy_share} is outside [0, 1]")
    rng = random.Random(f"prune {seed}")
    members: dict[str, list[int]] = {}
    for index, domain in enumerate(domains):
        members.setdefault(domain, []).append(index)
    ranked = {domain: _hardest_first(indices, replies, rng) for domain, indices in members.items()}
    easy = {domain: rated[(len(rated) + 1) // 2 :] for domain, rated in ranked.items()}

    sizes = {domain: len(indices) for domain, indices in members.items()}
    budget = apportion(int(keep_at_most * len(replies)), sizes, sizes)
    # The easy share takes nothing from a domain's easy half that the domain's own budget does not cover.
    easy_room = {domain: min(len(easy[domain]), budget[domain]) for domain in members}
    easy_budget = apportion(round(keep_easy_share * sum(budget.values())), budget, easy_room, leave_none_out=False)

    decisions: list[Decision] = [Decision(False, "pruned", "")] * len(replies)
    for domain, indices in members.items():
        drawn = rng.sample(easy[domain], easy_budget[domain])
        room = budget[domain] - len(drawn)
        unrated = [i for i in indices if isinstance(replies[i], JudgeFailure)]
        unknown = rng.sample(unrated, min(room, len(unrated)))
        hard = [i for i in ranked[domain] if i not in set(drawn)][: room - len(unknown)]
        groups: dict[int, Group] = {i: "pruned" for i in indices}
        chosen: list[tuple[Group, list[int]]] = [
            ("pruned_unknown", unrated), ("unknown", unknown), ("easy_share", drawn), ("hard", hard)
        ]  # fmt: skip
        groups.update({i: group for group, places in chosen for i in places})  # a later group overrides an earlier one
        rank = {index: place for place, index in enumerate(ranked[domain], start=1)}
        for i in indices:
            decisions[i] = _decision(groups[i], replies[i], f"place {rank.get(i)} of {len(rank)} in {domain}")
    return decisions


def _hardest_first(indices: Sequence[int], replies: Sequence[Verdict | JudgeFailure], rng: random.Random) -> list[int]:
    scores = {i: reply.score for i in indices if isinstance(reply := replies[i], Verdict)}
    shuffled = rng.sample(list(scores), len(scores))  # sorted() is stable: equal scores stay in random order
    return sorted(shuffled, key=lambda i: -scores[i])


def _decision(group: Group, reply: Verdict | JudgeFailure, place: str) -> Decision:
    if isinstance(reply, JudgeFailure):
        kept = "kept unrated" if group == "unknown" else "pruned by lot, too many unrated"
        return Decision(group == "unknown", group, f"{kept}: {reply.reason}")
    said = f"difficulty {reply.score:.2f}, {place}"
    words = {"hard": "kept as hard", "easy_share": "kept by lot from the easy half", "pruned": "pruned as easier"}
    return Decision(group != "pruned", group, f"{words[group]}: {said}")


def apportion(
    total: int, weights: Mapping[str, int], room: Mapping[str, int], leave_none_out: bool = True
) -> dict[str, int]:
    """Split `total` in whole numbers in proportion to `weights`, at most `room[key]` each, as much as fits.

    Largest remainders, filled one at a time: the next goes to the key that is furthest below its share. With
    `leave_none_out`, every key that has room gets one before any gets its share, as far as `total` goes.
    """
    shares = {key: 0 for key in weights}
    weight_sum = sum(weights.values())
    for _ in range(min(total, sum(room.values()))):
        open_keys = [key for key in shares if shares[key] < room[key]]
        empty = [key for key in open_keys if shares[key] == 0] if leave_none_out else []
        neediest = max(empty or open_keys, key=lambda key: total * weights[key] / weight_sum - shares[key])
        shares[neediest] += 1
    return shares
