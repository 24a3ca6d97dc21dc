import json

import pytest

from rl.gates import Choice, Dapo, Open, Outcome, Speed, has_signal

CHOICE = Choice(entry="a", size=8, known=20.0, expected=0.5)
RARE = Choice(entry="b", size=8, known=1.0, expected=0.5)
WRONG, RIGHT = [0.0] * 4, [1.0] * 4


def outcome(kept, total=8, size=8, answers=None):
    choice = Choice(entry="a", size=size, known=0.0, expected=0.5)
    return Outcome(slot=0, turn=0, choice=choice, passes=0, total=total, version=0, answers=answers or total, tokens=9,
                   trained_tokens=0, kept=kept)  # fmt: skip


@pytest.mark.parametrize(
    "scores, signal",
    [([1.0, 0.0], True), ([0.0, 0.0], False), ([None, 1.0], False), ([None, 0.5, 1.0], True), ([], False)],
)
def test_signal_is_two_graded_answers_that_differ(scores, signal):
    assert has_signal(scores) is signal


def test_without_a_gate_every_group_is_whole_and_kept():
    gate = Open()
    assert (gate.first(CHOICE), gate.replaces) == (8, False)
    assert gate.verdict(CHOICE, WRONG * 2) == gate.verdict(CHOICE, WRONG + RIGHT) == "keep"


def test_dapo_replaces_whole_groups_without_signal():
    gate = Dapo()
    assert (gate.first(CHOICE), gate.replaces) == (8, True)
    assert gate.verdict(CHOICE, WRONG * 2) == gate.verdict(RARE, RIGHT * 2) == "replace"
    assert gate.verdict(CHOICE, WRONG + RIGHT) == "keep"


def test_speed_goes_on_only_where_the_first_few_differ_or_little_is_known():
    gate = Speed(screen=4, rare_answers=4.0)
    assert gate.first(CHOICE) == 4 and gate.first(Choice(entry="a", size=3, known=0, expected=0)) == 3
    assert gate.verdict(CHOICE, [1.0, 0.0, 0.0, 0.0]) == "more"
    assert gate.verdict(CHOICE, WRONG) == gate.verdict(CHOICE, RIGHT) == "replace"
    assert gate.verdict(RARE, WRONG) == gate.verdict(RARE, RIGHT) == "more"
    assert gate.verdict(RARE, WRONG + WRONG) == "replace"
    assert gate.verdict(CHOICE, RIGHT + WRONG) == "keep"


def test_a_group_no_larger_than_the_screen_is_whole_at_once():
    gate = Speed(screen=4, rare_answers=4.0)
    small = Choice(entry="b", size=4, known=0.0, expected=0.5)
    assert gate.verdict(small, WRONG) == "replace" and gate.verdict(small, [1.0, 0.0, 0.0, 0.0]) == "keep"


def test_gates_count_what_became_of_the_groups():
    gate = Speed(screen=4, rare_answers=4.0)
    gate.learn([outcome(True), outcome(False, total=4), outcome(False, total=7, answers=8), outcome(True)])
    assert gate.metrics() == {"kept_share": 0.5, "screened_out_share": 0.25}
    other = Speed(screen=4, rare_answers=4.0)
    other.restore(json.loads(json.dumps(gate.state())))
    assert other.metrics() == gate.metrics()
    assert Dapo().metrics() == {"kept_share": 0.0} and Open().metrics() == Open().state() == {}
