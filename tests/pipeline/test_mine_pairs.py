"""Which pairs are mined from graded rollouts: every rule with a group built for it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.mine_pairs import MinedPairs, categorise, mine_pairs


def answer(score: float | None, *, length: int = 10, finish: str = "stop", reason: str = "wrong", **over: Any) -> dict:
    row = {
        "task_id": "maths/3/1", "domain": "maths", "level": 3, "group_id": "g0", "step": 5, "prompt_ids": [1, 2, 3],
        "answer_ids": list(range(length)), "text": f"{score} {length}", "score": score, "reason": reason,
        "finish_reason": finish,
    }  # fmt: skip
    return row | over


def mine(rows: list[dict], **over: Any) -> MinedPairs:
    settings = {"last_steps": 10, "max_length_ratio": 1.5, "max_tokens": 100, "max_pairs": 100}
    return mine_pairs(rows, **(settings | over))


def test_a_right_and_a_wrong_answer_of_one_group_make_a_pair_with_the_sampled_ids():
    mined = mine([answer(1.0, length=8), answer(0.0, length=9)])
    (pair,) = mined.pairs
    assert (pair.chosen_ids, pair.rejected_ids) == (list(range(8)), list(range(9)))
    assert (pair.prompt_ids, pair.category, pair.chosen_score, pair.rejected_score) == ([1, 2, 3], "wrong", 1.0, 0.0)
    assert mined.dropped == {}


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([answer(0.9), answer(0.0)], "no_full_score"),
        ([answer(1.0, finish="length"), answer(0.0)], "no_full_score"),  # right by luck, never ended
        ([answer(1.0), answer(1.0)], "no_clear_failure"),
        ([answer(1.0), answer(0.75)], "no_clear_failure"),
        ([answer(1.0), answer(None)], "no_clear_failure"),  # ungraded is not wrong
        ([answer(1.0, length=10), answer(0.0, length=16)], "length_ratio"),
        ([answer(1.0, length=16), answer(0.0, length=10)], "length_ratio"),
        ([answer(1.0, length=98), answer(0.0, length=98)], "too_long"),
    ],
)
def test_a_group_without_a_pair_is_counted_by_its_reason(rows, reason):
    mined = mine(rows)
    assert mined.pairs == []
    assert mined.dropped == {reason: 1}


def test_answers_of_different_groups_never_meet():
    assert mine([answer(1.0, group_id="a"), answer(0.0, group_id="b")]).pairs == []


def test_length_ratio_at_the_limit_is_accepted():
    assert len(mine([answer(1.0, length=10), answer(0.0, length=15)]).pairs) == 1


def test_only_the_last_steps_are_mined():
    old = [answer(1.0, group_id="old", step=5, task_id="a"), answer(0.0, group_id="old", step=5, task_id="a")]
    new = [answer(1.0, group_id="new", step=15, task_id="b"), answer(0.0, group_id="new", step=15, task_id="b")]
    mined = mine(old + new, last_steps=10)
    assert [pair.group_id for pair in mined.pairs] == ["new"]
    assert mined.num_groups == 1
    assert len(mine(old + new, last_steps=11).pairs) == 2


def test_what_no_step_trained_on_is_never_mined_however_short_the_run():
    """A group that was lost stands beside the one that took its place, under the same name."""
    lost = [answer(None, step=0), answer(None, step=0)]
    kept = [answer(1.0, step=2), answer(0.0, step=2)]
    mined = mine(lost + kept, last_steps=10)
    assert (mined.num_groups, mined.num_ungraded, len(mined.pairs)) == (1, 0, 1)


def test_one_pair_a_task_and_the_corner_case_wins():
    wrong = [answer(1.0, group_id="a", step=9), answer(0.0, group_id="a", step=9)]
    broken = [answer(1.0, group_id="b"), answer(0.0, group_id="b", reason="no final answer")]
    mined = mine(wrong + broken)
    assert [(pair.group_id, pair.category) for pair in mined.pairs] == [("b", "format")]
    assert mined.dropped == {"same_task": 1}


def test_within_a_group_the_truncated_answer_is_rejected_first():
    rows = [answer(1.0), answer(0.0), answer(0.0, length=12, finish="length"), answer(0.0, reason="no final answer")]
    assert mine(rows).pairs[0].category == "truncated"


def test_among_equals_the_pair_most_alike_in_length_is_taken():
    rows = [answer(1.0, length=10), answer(0.0, length=14), answer(0.0, length=11), answer(0.0, length=8)]
    assert len(mine(rows).pairs[0].rejected_ids) == 11


def test_a_cut_leaves_the_domains_in_balance_and_the_corner_cases_in():
    rows = []
    for domain, count in (("maths", 6), ("code", 2)):
        for i in range(count):
            task = {"task_id": f"{domain}/{i}", "group_id": f"{domain}/{i}", "domain": domain}
            corner = "no final answer" if i == count - 1 else "wrong"
            rows += [answer(1.0, **task), answer(0.0, reason=corner, **task)]
    mined = mine(rows, max_pairs=4)
    assert sorted(pair.domain for pair in mined.pairs) == ["code", "code", "maths", "maths"]
    assert sorted(pair.category for pair in mined.pairs) == ["format", "format", "wrong", "wrong"]
    assert mined.dropped == {"over_max_pairs": 4}


@pytest.mark.parametrize(
    ("finish", "reason", "category"),
    [
        ("length", "no final answer", "truncated"),
        ("stop", "no final answer", "format"),
        ("stop", "SyntaxError: invalid syntax (<answer>, line 1)", "format"),
        ("stop", "NameError: no function 'f' is defined", "format"),
        ("stop", "got 'no final answer'", "wrong"),  # the answer's own words do not decide
        ("stop", "ZeroDivisionError: division by zero", "wrong"),
    ],
)
def test_category(finish, reason, category):
    assert categorise(finish, reason) == category


rollouts = st.lists(
    st.builds(
        lambda score, length, finish, group, step: answer(
            score, length=length, finish=finish, group_id=f"g{group}", task_id=f"t{group % 3}", step=step + group,
            domain="code" if group % 2 else "maths",
        ),
        st.sampled_from([None, 0.0, 0.5, 1.0]), st.integers(0, 30), st.sampled_from(["stop", "length"]),
        st.integers(0, 7), st.just(3),
    ),
    max_size=60,
)  # fmt: skip


@given(rollouts)
def test_every_group_ends_in_one_pair_or_one_reason(rows):
    mined = mine(rows, max_pairs=2)
    assert len(mined.pairs) + sum(mined.dropped.values()) == mined.num_groups
    assert len({pair.task_id for pair in mined.pairs}) == len(mined.pairs) <= 2
    for pair in mined.pairs:
        assert pair.chosen_score == 1.0 and pair.rejected_score <= 0.5
        assert 1 / 1.5 <= len(pair.chosen_ids) / len(pair.rejected_ids) <= 1.5


@given(rollouts, st.randoms())
def test_the_order_of_the_rows_of_different_groups_does_not_matter(rows, rng):
    by_group: dict[str, list[dict]] = {}
    for row in rows:
        by_group.setdefault(row["group_id"], []).append(row)
    groups = list(by_group.values())
    rng.shuffle(groups)
    assert mine([row for group in groups for row in group]) == mine(rows)
