"""What is kept: never too much, no domain forgotten, easy ones by lot, unrated ones first."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from judges.prune import Decision, apportion, prune
from judges.verdict import JudgeFailure, Verdict

Reply = Verdict | JudgeFailure
LOST = JudgeFailure("off-label")


def rated(score: float) -> Verdict:
    return Verdict(score, (0.0, 0.0, 1.0, 0.0, 0.0), "by hand")


def decide(
    replies: list[Reply], domains: list[str] | None = None, keep: float = 0.5, easy: float = 0.0, seed: int = 0
) -> list[Decision]:
    domains = ["maths"] * len(replies) if domains is None else domains
    return prune(replies, domains, keep_at_most=keep, keep_easy_share=easy, seed=seed)


def kept(decisions: list[Decision]) -> list[int]:
    return [i for i, decision in enumerate(decisions) if decision.kept]


def test_hardest_are_kept() -> None:
    decisions = decide([rated(score) for score in (2.0, 4.5, 1.0, 3.0, 5.0, 2.5)])
    assert kept(decisions) == [1, 3, 4]  # the tempting wrong way round keeps 0, 2, 5
    assert decisions[4] == Decision(True, "hard", "kept as hard: difficulty 5.00, place 1 of 6 in maths")
    assert decisions[2] == Decision(False, "pruned", "pruned as easier: difficulty 1.00, place 6 of 6 in maths")


def test_each_domain_keeps_its_share_however_easy_the_judge_finds_it() -> None:
    replies = [rated(5.0 + i) for i in range(8)] + [rated(1.0 + i / 10) for i in range(4)]
    decisions = decide(list(replies), ["code"] * 8 + ["dialogue"] * 4)
    assert Counter("code" if i < 8 else "dialogue" for i in kept(decisions)) == {"code": 4, "dialogue": 2}


def test_a_tiny_domain_does_not_vanish() -> None:
    decisions = decide([rated(3.0)] * 40 + [rated(1.0)], ["maths"] * 40 + ["code"], keep=0.1)
    assert len(kept(decisions)) == 4 and 40 in kept(decisions)


def test_easy_share_is_drawn_by_lot_from_the_easier_half() -> None:
    replies: list[Reply] = [rated(i / 100) for i in range(200)]  # place = ease
    drawn = []
    for seed in range(30):
        decisions = decide(replies, keep=0.3, easy=0.2, seed=seed)
        assert len(kept(decisions)) == 60
        easy = [i for i, decision in enumerate(decisions) if decision.group == "easy_share"]
        assert len(easy) == 12 and max(easy) < 100
        assert [i for i in kept(decisions) if i not in easy] == list(range(152, 200))
        drawn += easy
    assert len(set(drawn)) > 90  # over many seeds nearly every easy prompt: not always the same ones


def test_unrated_prompts_are_kept_before_rated_ones() -> None:
    decisions = decide([rated(5.0), LOST, rated(4.0), rated(3.0), LOST, rated(2.0)])
    assert kept(decisions) == [0, 1, 4]
    assert decisions[1] == Decision(True, "unknown", "kept unrated: off-label")


def test_too_many_unrated_prompts_are_kept_by_lot_within_the_budget() -> None:
    counts: Counter[int] = Counter()
    for seed in range(200):
        decisions = decide([LOST] * 6 + [rated(5.0)] * 2, seed=seed)
        groups = Counter(decision.group for decision in decisions)
        assert groups == {"unknown": 4, "pruned_unknown": 2, "pruned": 2}
        counts.update(kept(decisions))
    assert all(95 < counts[i] < 175 for i in range(6))  # 2/3 of 200 each; the first four every time would be 200


def test_equal_scores_are_ordered_by_lot_not_by_place() -> None:
    chosen = {tuple(kept(decide([rated(3.0)] * 10, seed=seed))) for seed in range(20)}
    assert len(chosen) > 10


def test_at_least_half_must_go() -> None:
    with pytest.raises(ValueError, match="0.6"):
        decide([rated(1.0)] * 4, keep=0.6)


replies_of = st.lists(
    st.tuples(st.sampled_from("abc"), st.one_of(st.just(None), st.floats(1.0, 5.0))), min_size=0, max_size=60
)


@given(replies_of, st.floats(0.01, 0.5), st.floats(0.0, 1.0), st.integers(0, 9))
def test_promises_hold_for_any_replies(
    drawn: list[tuple[str, float | None]], keep: float, easy: float, seed: int
) -> None:
    domains = [domain for domain, _ in drawn]
    replies: list[Reply] = [LOST if score is None else rated(score) for _, score in drawn]
    decisions = decide(replies, domains, keep, easy, seed)
    budget = int(keep * len(replies))
    assert len(kept(decisions)) == budget
    if budget >= len(set(domains)):
        assert {domains[i] for i in kept(decisions)} == set(domains)
    assert sum(decision.group == "easy_share" for decision in decisions) <= round(easy * budget)
    assert all(decision.reason for decision in decisions)
    assert decisions == decide(replies, domains, keep, easy, seed)


def test_apportion_by_hand() -> None:
    assert apportion(10, {"a": 50, "b": 30, "c": 20}, {"a": 99, "b": 99, "c": 99}) == {"a": 5, "b": 3, "c": 2}
    assert apportion(3, {"a": 98, "b": 1, "c": 1}, {"a": 98, "b": 1, "c": 1}) == {"a": 1, "b": 1, "c": 1}
    assert apportion(4, {"a": 9, "b": 1}, {"a": 2, "b": 9}) == {"a": 2, "b": 2}  # what one cannot take, others do
    assert apportion(9, {"a": 1, "b": 1}, {"a": 2, "b": 3}) == {"a": 2, "b": 3}
    assert apportion(1, {"a": 9, "b": 1}, {"a": 1, "b": 1}, leave_none_out=False) == {"a": 1, "b": 0}
