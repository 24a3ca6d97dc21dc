import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.domain_mix import MOST, DomainMix

DOMAINS = ["maths", "code", "reasoning", "dialogue"]


def test_domains_take_turns():
    mix = DomainMix(DOMAINS, 0.1)
    assert mix.assign(6) + mix.assign(4) == (DOMAINS * 3)[:10]
    three = DomainMix(DOMAINS[:3], 0.0)
    assert [turn for _ in range(50) for turn in three.assign(5)] == (DOMAINS[:3] * 84)[:250]


def test_a_heavier_domain_is_spread_over_the_batch():
    mix = DomainMix(["a", "b"], 0.0)
    mix.weights["a"] = 3.0
    assert "".join(mix.assign(8)) == "aabaaaba"


def test_turns_may_follow_the_size_of_the_domains():
    mix = DomainMix(["a", "b", "c"], 0.0)
    mix.sizes = {"a": 6, "b": 3, "c": 1}
    assert Counter(mix.assign(20)) == {"a": 12, "b": 6, "c": 2}
    mix.weights["c"] = 3.0  # for its floor's sake
    assert Counter(mix.assign(120)) == {"a": 60, "b": 30, "c": 30}


def train(mix, tokens_of, steps, slots=16):
    """Steps whose slots give so many trained tokens each; (share of tokens, share of slots) of the second half."""
    tokens, given_slots = Counter(), Counter()
    for step in range(steps):
        turns = Counter(mix.assign(slots))
        earned = {domain: turns[domain] * tokens_of[domain] for domain in turns}
        mix.learn(earned)
        if step >= steps // 2:
            tokens.update(earned)
            given_slots.update(turns)
    return ({d: tokens[d] / max(1, tokens.total()) for d in DOMAINS},
            {d: given_slots[d] / given_slots.total() for d in DOMAINS})  # fmt: skip


def test_a_domain_below_its_floor_gets_more_slots_until_it_has_it():
    poor = {"maths": 100, "code": 100, "reasoning": 100, "dialogue": 20}
    without, _ = train(DomainMix(DOMAINS, 0.0), poor, 40)
    assert without["dialogue"] == pytest.approx(20 / 320)
    with_floor, slots = train(DomainMix(DOMAINS, 0.12), poor, 40)
    assert with_floor["dialogue"] == pytest.approx(0.12, abs=0.015) and slots["dialogue"] < 0.5


def test_a_domain_that_teaches_hardly_anything_does_not_swallow_the_batch():
    _, slots = train(DomainMix(DOMAINS, 0.2), {"maths": 50, "code": 50, "reasoning": 50, "dialogue": 1}, 40)
    assert slots["dialogue"] == pytest.approx(MOST / (MOST + 3), abs=0.02)
    assert min(slots.values()) > 0.1


def test_domains_that_teach_nothing_have_their_turn_and_no_more():
    _, slots = train(DomainMix(DOMAINS, 0.1), {"maths": 50, "code": 50, "reasoning": 0, "dialogue": 0}, 40)
    assert slots == pytest.approx(dict.fromkeys(DOMAINS, 0.25))
    mix = DomainMix(DOMAINS, 0.1)
    train(mix, {"maths": 100, "code": 100, "reasoning": 100, "dialogue": 1}, 20)
    assert mix.weights["dialogue"] == MOST
    train(mix, {"maths": 100, "code": 100, "reasoning": 100, "dialogue": 0}, 40)
    assert mix.weights["dialogue"] == 1.0, "it has run dry"


def test_one_lucky_step_moves_no_weight_far():
    mix = DomainMix(DOMAINS, 0.1)
    mix.learn({"maths": 5000, "code": 5000, "reasoning": 5000, "dialogue": 2})
    assert mix.weights["dialogue"] == pytest.approx(1.5) and mix.weights["maths"] == 1.0


def test_weight_is_lost_again_when_the_floor_is_passed():
    mix = DomainMix(DOMAINS, 0.1)
    train(mix, {"maths": 100, "code": 100, "reasoning": 100, "dialogue": 1}, 20)
    assert mix.weights["dialogue"] == MOST
    train(mix, dict.fromkeys(DOMAINS, 100), 40)
    assert mix.weights == dict.fromkeys(DOMAINS, 1.0)


def test_a_step_that_trains_on_nothing_changes_nothing():
    mix = DomainMix(DOMAINS, 0.1)
    mix.learn({})
    assert mix.weights == dict.fromkeys(DOMAINS, 1.0) and set(mix.shares().values()) == {0.0}


def test_floors_that_cannot_all_be_kept_are_refused():
    with pytest.raises(ValueError, match="a floor of 0.3 for each of 4 domains"):
        DomainMix(DOMAINS, 0.3)


@settings(max_examples=60)
@given(
    st.lists(st.floats(10, 300), min_size=4, max_size=4),
    st.sampled_from([0.0, 0.05, 0.1, 0.15]),
    st.integers(4, 32),
)
def test_floors_are_kept_where_four_times_the_slots_can_keep_them(tokens, floor, slots):
    """`reachable`: what the domain would have with the highest weight while the others keep 1."""
    per_slot = dict(zip(DOMAINS, tokens))
    shares, _ = train(DomainMix(DOMAINS, floor), per_slot, 120, slots)
    for domain in DOMAINS:
        most = MOST * per_slot[domain]
        reachable = most / (most + sum(per_slot[d] for d in DOMAINS if d != domain))
        assert (
            shares[domain] >= min(floor, reachable) * 0.8 - 0.01 or sum(shares[d] < floor for d in DOMAINS) > 1
        )  # two that are poor compete


def test_a_mix_that_was_written_down_goes_on_as_it_was():
    one = DomainMix(DOMAINS, 0.15)
    train(one, {"maths": 90, "code": 70, "reasoning": 10, "dialogue": 33}, 7, slots=5)
    other = DomainMix(DOMAINS, 0.15)
    other.restore(json.loads(json.dumps(one.state())))
    for _ in range(10):
        assert one.assign(7) == other.assign(7)
        one.learn({"maths": 5}), other.learn({"maths": 5})
    assert one.state() == other.state()
