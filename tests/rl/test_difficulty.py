"""Posteriors by hand, and the states an entry passes through."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.difficulty import Difficulty, DifficultyRules, Entries, Observation

RULES = dict(
    decay=0.5, judge_strength=4.0, neighbour_strength=8.0, retire_above=0.9, park_below=0.1, retest_every=5,
    retest_rise=0.2, ordered_levels=False,
)  # fmt: skip


def difficulty(cells=None, judged=None, **changes):
    cells = cells or {"a": ("maths", 1), "b": ("maths", 1), "c": ("maths", 2), "d": ("code", 1)}
    return Difficulty(Entries(cells, judged=judged), DifficultyRules(**RULES | changes))


def posterior(one, name):
    alpha, beta = one.posterior(np.array([one.entries.id_of[name]]))
    return alpha[0], beta[0]


def seen(entry, passes, total, version=0):
    return Observation(entry, passes, total, version)


def state(one, name):
    return ("new", "active", "retired", "parked")[one.state[one.entries.id_of[name]]]


# --- posteriors -----------------------------------------------------------------------------------------------------


def test_an_observation_counts_by_the_version_that_gave_it():
    one = difficulty(neighbour_strength=0.0)
    one.learn(2, [seen("a", 4, 8, version=1), seen("a", 4, 4, version=2)])
    assert posterior(one, "a") == (1 + 4 / 2 + 4, 1 + 4 / 2)
    one.learn(4, [])  # two versions later all of it has faded to a quarter
    assert posterior(one, "a") == (1 + 6 / 4, 1 + 2 / 4)
    assert one.seen[0] == 2 and one.tried[0] == 2


def test_a_prompt_never_tried_begins_at_the_judges_word():
    one = difficulty(judged={"a": 0.75})
    assert posterior(one, "a") == (1 + 3.0, 1 + 1.0)
    assert posterior(one, "d") == (1.0, 1.0)


def test_neighbours_lend_as_many_answers_as_the_rule_says_and_no_more():
    one = difficulty(decay=1.0)
    one.learn(0, [seen("a", 6, 16)])
    assert posterior(one, "b") == (1 + 8 * 6 / 16, 1 + 8 * 10 / 16)  # eight answers of sixteen
    assert posterior(one, "a") == (1 + 6, 1 + 10)  # its own are not lent to itself
    assert posterior(one, "c") == posterior(one, "d") == (1.0, 1.0)  # another level, another domain
    one.learn(0, [seen("b", 0, 4)])
    assert posterior(one, "a") == (1 + 6, 1 + 10 + 4)  # four are fewer than eight: all of them


def test_an_entry_that_is_its_whole_cell_borrows_nothing():
    one = difficulty({"maths/1": ("maths", 1), "maths/2": ("maths", 2)}, decay=1.0)
    one.learn(0, [seen("maths/1", 3, 4)])
    assert posterior(one, "maths/1") == (4.0, 2.0)


def slow_strength(prompts):
    """Of one cell; each prompt (decayed passes, decayed fails, answers ever)."""
    prompts = [(p, f, n) for p, f, n in prompts if p + f > 1e-6]
    total = sum(p + f for p, f, _ in prompts)
    mean = sum(p for p, _, _ in prompts) / total
    variance = max(mean * (1 - mean), 1e-6)
    scatter = sum((p + f) * (p / (p + f) - mean) ** 2 for p, f, _ in prompts)
    alike = sum((p + f) * (1 - (p + f) / total) / n for p, f, n in prompts)
    correlated = sum((p + f) * (1 - (p + f) / total) * (n - 1) / n for p, f, n in prompts)
    seen = min(1.0, max(0.0, (scatter / variance - alike) / max(correlated, 1e-6)))
    correlation = (2 * 1 / 9 + alike * seen) / (2 + alike)
    return min(64.0, 1 / max(correlation, 1e-6) - 1)


def history_of(name, history, weight):
    own = [(weight[i], p) for i, (entry, p, _) in enumerate(history) if entry == name]
    return sum(w * p for w, p in own), sum(w * (8 - p) for w, p in own), 8 * len(own)


def test_how_much_neighbours_tell_is_learnt_from_how_alike_they_are():
    """Worked by hand for prompts of 16 answers each."""
    cells = {f"p{i}": ("maths", 1) for i in range(9)}
    dead, mixed, even = (difficulty(cells, decay=1.0) for _ in range(3))
    for i in range(8):
        dead.learn(0, [seen(f"p{i}", 0, 16)])
        mixed.learn(0, [seen(f"p{i}", 16 * (i % 2), 16)])
        even.learn(0, [seen(f"p{i}", 8, 16)])
    # No scatter: ρ = (2/9 + 7·0)/(2 + 7) = 2/81, and 1/ρ - 1 = 39.5 answers, all of them wrong.
    assert posterior(dead, "p8") == pytest.approx((1.0, 1 + 39.5)) and posterior(even, "p8") == pytest.approx(
        (1 + 39.5 / 2, 1 + 39.5 / 2)
    )
    # All or nothing: scatter 128·¼, over ¼ is 128; (128 - 7)/(7·15) is above 1. ρ = (2/9 + 7)/9.
    assert posterior(mixed, "p8") == pytest.approx((1 + (81 / 65 - 1) / 2, 1 + (81 / 65 - 1) / 2))


def test_neighbours_lend_at_most_so_much_and_nothing_where_they_shall_not():
    cells = {f"p{i}": ("maths", 1) for i in range(100)}
    many, none = difficulty(cells, decay=1.0), difficulty(cells, decay=1.0, neighbour_strength=0.0)
    for one in (many, none):
        one.learn(0, [seen(f"p{i}", 0, 16) for i in range(99)])
    assert posterior(many, "p99") == pytest.approx((1.0, 65.0)) and posterior(none, "p99") == (1.0, 1.0)


def ladder(*counts, **changes):
    """A domain of so many levels, of each (passes, fails)."""
    one = difficulty(
        {f"maths/{level}": ("maths", level) for level in range(1, len(counts) + 1)},
        **{"decay": 1.0, "ordered_levels": True} | changes,
    )
    one.learn(0, [seen(f"maths/{i}", p, p + f) for i, (p, f) in enumerate(counts, 1) if p + f])
    return one


def test_what_nobody_knows_may_be_anything_whatever_the_order_of_levels():
    alpha, beta = ladder((0, 0), (0, 0), (0, 0)).level_prior()
    assert list(alpha) == list(beta) == pytest.approx([1.0, 1.0, 1.0])


def test_a_level_bounds_those_above_it_from_above_and_those_below_it_from_below():
    """By hand: 0 of 4 is Beta(1, 5), at most 1/6 + √3·√(5/252) = 0.4107. Uniform up to u has the mean u/2 and the
    variance u²/12, as a Beta distribution worth 6/u - 4 answers."""
    alpha, beta = ladder((0, 0), (0, 4), (0, 0)).level_prior()
    bound = 1 / 6 + math.sqrt(3 * 5 / 252)
    assert (alpha[0], beta[0]) == (1.0, 1.0), "the one below may be anything"
    assert (alpha[1], beta[1]) == (1.0, 1.0), "its own answers are not counted twice"
    assert alpha[2] + beta[2] == pytest.approx(6 / bound - 4) and alpha[2] / (alpha[2] + beta[2]) == pytest.approx(
        bound / 2
    )
    mirrored = ladder((0, 0), (4, 0), (0, 0)).level_prior()
    assert mirrored[0][0] == pytest.approx(beta[2]) and mirrored[1][0] == pytest.approx(alpha[2])


def test_prompts_without_a_level_stand_beside_the_ladder_not_below_it():
    """A data set that states none, with easy made-up tasks of the same domain in its pool."""
    cells = {"word problem": ("maths", 0), "maths/1": ("maths", 1), "maths/2": ("maths", 2)}
    one = difficulty(cells, decay=1.0, ordered_levels=True)
    one.learn(0, [seen("maths/1", 10, 10)])
    assert posterior(one, "word problem") == (1.0, 1.0)
    one.learn(0, [seen("word problem", 0, 40)])
    assert posterior(one, "maths/2") == (1.0, 1.0), "word problems say nothing of it"
    assert [[one.entries.names[i] for i in ladder] for ladder in one.entries.ladders] == [["maths/1", "maths/2"]]
    assert list(one.entries.easier) == [-1, -1, 1]


def test_levels_together_say_more_than_each_and_never_more_than_so_many_answers():
    one, many = ladder((0, 4), (0, 0)).level_prior(), ladder((0, 4), (0, 4), (0, 4), (0, 0)).level_prior()
    assert many[1][3] > one[1][1]
    alpha, beta = ladder((0, 400), (0, 0)).level_prior()
    assert alpha[1] + beta[1] == pytest.approx(32.0)


def test_levels_that_are_not_in_order_leave_a_prior_between_their_bounds():
    alpha, beta = ladder((0, 400), (0, 0), (400, 0)).level_prior()
    assert alpha[1] / (alpha[1] + beta[1]) == pytest.approx(0.5)


def test_own_answers_and_neighbours_come_on_top_of_the_order_of_levels():
    cells = {"easy": ("maths", 1), "a": ("maths", 2), "b": ("maths", 2), "other": ("code", 2)}
    one = difficulty(cells, decay=1.0, ordered_levels=True)
    one.learn(0, [seen("easy", 0, 16), seen("a", 2, 4)])
    alpha, beta = one.level_prior()
    cell = one.entries.cell[1]
    assert posterior(one, "a") == pytest.approx((alpha[cell] + 2, beta[cell] + 2))
    assert posterior(one, "b") == pytest.approx((alpha[cell] + 2, beta[cell] + 2))
    assert posterior(one, "other") == (1.0, 1.0)


def slow_bounds(counts, level):
    """(least, most) that levels put on one, by all runs below and above it."""

    def spread(some):
        alpha, beta = 1 + sum(p for p, _ in some), 1 + sum(f for _, f in some)
        total = alpha + beta
        return alpha / total, math.sqrt(3 * alpha * beta / (total + 1)) / total

    most = [mean + width for mean, width in (spread(counts[first:level]) for first in range(level))]
    least = [
        mean - width for mean, width in (spread(counts[level + 1 : last]) for last in range(level + 2, len(counts) + 1))
    ]
    return max([0.0, *least]), min([1.0, *most])


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 16), st.integers(0, 16)), min_size=2, max_size=6))
def test_bounds_of_levels_agree_with_a_slow_twin(counts):
    alpha, beta = ladder(*counts).level_prior()
    for level in range(len(counts)):
        least, most = sorted(slow_bounds(counts, level))
        assert alpha[level] / (alpha[level] + beta[level]) == pytest.approx((least + most) / 2, abs=1e-3)


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(st.sampled_from("abcd"), st.integers(0, 8), st.integers(0, 3)), min_size=1, max_size=30
    ),
    st.floats(0.3, 1.0),
)  # fmt: skip
def test_columns_agree_with_a_slow_twin(groups, decay):
    """The twin keeps every observation, and adds them up when it is asked."""
    one = difficulty(judged={"b": 0.25}, decay=decay)
    history, version = [], 0
    for entry, passes, pause in groups:
        version += pause
        history.append((entry, passes, version))
        one.learn(version, [seen(entry, passes, 8, version)])
    weight = {i: decay ** (version - at) for i, (_, _, at) in enumerate(history)}
    for name in "abcd":
        own = [(weight[i] * p, weight[i] * (8 - p)) for i, (entry, p, _) in enumerate(history) if entry == name]
        others = [
            (weight[i] * p, weight[i] * (8 - p)) for i, (entry, p, _) in enumerate(history)
            if entry != name and {entry, name} == {"a", "b"}
        ]  # fmt: skip
        total = sum(map(sum, others))
        cell = "ab" if name in "ab" else name
        lent = min(1.0, slow_strength([history_of(entry, history, weight) for entry in cell]) / total) if total else 0.0
        alpha = 1 + sum(p for p, _ in own) + lent * sum(p for p, _ in others) + (4 * 0.25 if name == "b" else 0)
        beta = 1 + sum(f for _, f in own) + lent * sum(f for _, f in others) + (4 * 0.75 if name == "b" else 0)
        # Where nearly all is forgotten and nearly nothing was right, the estimate of ρ feels the rounding of a float.
        assert posterior(one, name) == pytest.approx((alpha, beta), rel=1e-3, abs=1e-4)


# --- states ---------------------------------------------------------------------------------------------------------


def test_an_entry_is_new_then_active_then_retired_and_comes_back_when_a_re_test_says_so():
    one = difficulty(decay=1.0)
    (change,) = one.learn(1, [seen("a", 4, 8, 1)])
    assert (change.entry, change.before, change.after) == ("a", "new", "active")
    assert change.reason == "first tried: 4 of 8 right, pass rate 0.50"
    assert one.learn(2, [seen("a", 8, 8, 2)]) == [] and state(one, "a") == "active"  # (1 + 12)/(2 + 16) = 0.72
    (change,) = one.learn(3, [seen("a", 32, 32, 3)])  # (1 + 44)/(2 + 48)
    assert change.after == "retired" and change.reason == "tried again: 32 of 32 right, pass rate 0.90"
    ids = np.arange(4)
    assert list(one.due_now(ids)) == []
    one.learn(7, [])
    assert list(one.due_now(ids)) == []
    one.learn(8, [])
    assert list(one.due_now(ids)) == [0]  # five versions later
    assert one.learn(8, [seen("a", 8, 8, 8)]) == [] and list(one.due_now(ids)) == []  # stays, and waits again
    one.learn(13, [])
    (change,) = one.learn(13, [seen("a", 0, 8, 13)])
    assert (change.before, change.after) == ("retired", "active") and change.reason.startswith("re-tested: 0 of 8")
    one.learn(99, [])
    assert list(one.due_now(ids)) == []


def test_a_parked_entry_is_tested_again_as_its_neighbours_rise():
    """b is its neighbour in the cell; c, one level up, is watched over by both."""
    one = difficulty(decay=1.0, neighbour_strength=0.0)
    one.learn(0, [seen("b", 2, 10), seen("a", 0, 10), seen("c", 0, 20)])
    assert [state(one, name) for name in "abcd"] == ["parked", "active", "parked", "new"]
    assert list(one.watched[[0, 2]]) == [0.2, 0.1]
    one.learn(1, [seen("b", 4, 10, 1)])  # 6 of 20: a has seen 0.2 → 0.3, c 0.1 → 6 of 30
    assert list(one.due_now(np.arange(4))) == [] and one.num_due() == 0
    one.learn(2, [seen("b", 7, 10, 2)])  # 13 of 30 for a, 13 of 40 for c
    assert list(one.due_now(np.arange(4))) == [0, 2] and one.num_due() == 2
    one.learn(3, [])
    assert one.due[3] == np.iinfo(np.int32).max


def test_a_parked_entry_without_neighbours_is_tested_again_on_schedule():
    one = difficulty({"hard": ("maths", 9)})
    one.learn(0, [seen("hard", 0, 16)])
    assert state(one, "hard") == "parked"
    one.learn(4, [])
    assert not len(one.due_now(np.array([0])))
    one.learn(5, [])
    assert list(one.due_now(np.array([0]))) == [0]


def test_forgetting_is_no_rise():
    """What fades takes passes and fails alike: a rate that nobody measured anew does not move."""
    one = difficulty(neighbour_strength=0.0, retest_every=1000)
    one.learn(0, [seen("a", 0, 32), seen("b", 0, 32)])
    one.learn(400, [])
    assert not len(one.due_now(np.arange(4)))


def test_neighbours_and_the_judge_retire_nobody():
    one = difficulty(decay=1.0, judged={"a": 1.0}, judge_strength=100.0)
    one.learn(0, [seen("b", 50, 50), seen("a", 4, 4)])
    assert state(one, "b") == "retired" and state(one, "a") == "active"
    assert posterior(one, "a")[0] > 100


def test_without_limits_nothing_retires():
    one = difficulty(retire_above=None, park_below=None)
    one.learn(0, [seen("a", 99, 99), seen("b", 0, 99)])
    assert state(one, "a") == state(one, "b") == "active"
    assert one.counts() == {"new": 2, "active": 2, "retired": 0, "parked": 0}


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 16), st.integers(0, 4)), max_size=40))
def test_a_state_that_was_written_down_goes_on_bit_for_bit(groups):
    one, version = difficulty(), 0
    other = None
    for number, (entry, passes, pause) in enumerate(groups):
        version += pause
        changes = one.learn(version, [seen(entry, passes, 16, version)])
        if other is not None:
            assert other.learn(version, [seen(entry, passes, 16, version)]) == changes
        if number == len(groups) // 2:
            other = difficulty()
            other.restore(json.loads(json.dumps(one.to_json())))
    if other is not None:
        for column in ("passes", "fails", "tried", "seen", "state", "due", "watched"):
            assert np.array_equal(getattr(one, column), getattr(other, column)), column
        assert json.dumps(one.to_json()) == json.dumps(other.to_json())


def test_evidence_that_has_faded_away_is_gone():
    one = difficulty(decay=0.9)
    one.learn(0, [seen("a", 8, 16)])
    one.learn(400, [])  # 8 · 0.9^400 answers
    assert one.passes[0] == 0.0 and not math.isnan(one.mean(np.array([0]))[0])
