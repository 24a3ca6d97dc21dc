import doctest

import pytest
from curricula import curriculum
from hypothesis import given
from hypothesis import strategies as st

from rl import band
from rl.band import counts_inside, reachable_band, set_aside_in_words
from rl.difficulty import Observation


@pytest.mark.parametrize(
    "size, wanted, counts",
    [
        (8, (0.25, 0.75), [2, 3, 4, 5, 6]),
        (16, (0.25, 0.75), list(range(4, 13))),
        (3, (0.25, 0.75), [1, 2]),
        (10, (0.3, 0.7), [3, 4, 5, 6, 7]),  # 0.3 · 10 is 3.0000000000000004 in some spellings
        (2, (0.6, 0.9), []),
        (4, (0.0, 1.0), [1, 2, 3]),  # none and all right carry no signal
    ],
)
def test_counts_are_those_that_a_group_can_really_have(size, wanted, counts):
    assert list(counts_inside(size, wanted)) == counts


@given(st.integers(2, 64), st.integers(0, 64), st.integers(0, 64))
def test_every_count_and_no_other_lies_inside(size, one, other):
    low, high = sorted((one / 64, other / 64))
    inside = [count for count in range(1, size) if low * size <= count <= high * size]
    assert list(counts_inside(size, (low, high))) == inside


def test_a_band_without_a_count_says_what_would_have_one():
    assert reachable_band(3, (0.25, 0.75)) == (1 / 3, 2 / 3)
    with pytest.raises(ValueError, match="no count of right answers of 2 lies between 0.6 and 0.9; .* group_size to 3"):
        reachable_band(2, (0.6, 0.9))


def test_words():
    assert doctest.testmod(band).failed == 0
    assert band.band_in_words(2, (0.25, 0.75)) == "1 right of 2 is inside the band 0.25 to 0.75"


@given(st.integers(50, 99), st.integers(1, 50))
def test_so_many_answers_set_a_task_aside_and_one_less_does_not(retire_percent, park_percent):
    """`rl/difficulty.py` itself, of answers that nothing has faded of."""
    retire_above, park_below = retire_percent / 100, park_percent / 100
    words = set_aside_in_words(retire_above, park_below)
    right, wrong = (int(part.split(" after ")[1].split()[0]) for part in words.split(";"))
    for count, passes, state in ((right, right, "retired"), (wrong, 0, "parked")):
        for answers, expected in ((count, state), (count - 1, "active")):
            if answers:
                one = curriculum(retire_above=retire_above, park_below=park_below).difficulty
                one.learn(0, [Observation("maths/1", min(passes, answers), answers, 0)])
                assert one.counts()[expected] == 1, (answers, expected)
