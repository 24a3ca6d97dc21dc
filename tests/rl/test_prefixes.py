"""Which right answers are kept, what is begun with them, and that nothing else learns from it."""

import dataclasses
import json

import numpy as np
import pytest
from curricula import curriculum, prompts
from test_curriculum import outcome

from rl.difficulty import Observation
from rl.prefixes import Prefixes


def pool(**changes):
    """Sixty prompts of two domains, begun for half of all places."""
    return curriculum(prompts(60), prefix_share=0.5, **changes)


def taught(one, version=1):
    """p0 and p1 (maths and code, level 1) were hard, and p0 was once answered rightly."""
    planned = [turns[0] for turns in one.plan(range(2))]
    zero, other = planned[0], planned[1]
    first = outcome(0, 0, zero, 1, 0)
    fields = {name: getattr(first, name) for name in type(first).__slots__} | {"right": (7, 8, 9, 10, 2)}
    one.learn(version, [type(first)(**fields), outcome(1, 0, other, 0, 0)], planned)
    return zero.entry


def test_the_shortest_right_answer_of_a_hard_prompt_is_kept_until_it_is_hard_no_more():
    one = curriculum(prompts(4), decay=1.0, neighbour_strength=0.0)
    kept = Prefixes(hard_below=0.25)
    one.difficulty.learn(0, [Observation("p0", 1, 16, 0), Observation("p1", 8, 16, 0)])
    kept.learn(1, {"p0": (1, 2, 3, 4), "p1": (5, 6)}, one.difficulty)
    assert kept.known == {"p0": (1, (1, 2, 3, 4))}, "p1 is not hard"
    kept.learn(2, {"p0": (1, 2, 3, 4, 5)}, one.difficulty)
    assert kept.known["p0"] == (1, (1, 2, 3, 4))
    kept.learn(3, {"p0": (9, 9, 9, 9)}, one.difficulty)
    assert kept.known["p0"] == (3, (9, 9, 9, 9)), "of equal length the newer one"
    kept.learn(54, {}, one.difficulty)
    assert kept.known == {}, "51 versions old"
    kept.learn(55, {"p0": (1, 2)}, one.difficulty)
    one.difficulty.learn(55, [Observation("p0", 16, 16, 55)])
    kept.learn(56, {}, one.difficulty)
    assert kept.known == {}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_two_groups_of_a_prompt_in_one_step_the_shorter_answer_is_kept(order):
    one = pool()
    (choice,) = one.plan(range(1))[0]
    answers = [(7, 8, 2), (1, 3, 5, 2)]
    seen = [dataclasses.replace(outcome(slot, 0, choice, 1, 0), right=answers[i]) for slot, i in enumerate(order)]
    one.learn(1, seen, [choice])
    assert one.prefixes.known == {choice.entry: (1, (7, 8, 2))}


def test_a_beginning_is_a_quarter_to_three_quarters_and_never_the_whole():
    kept = Prefixes(hard_below=0.25)
    kept.known = {"long": (0, tuple(range(100))), "two": (0, (5, 6)), "one": (0, (5,))}
    rng = np.random.default_rng(0)
    lengths = [len(kept.draw("long", rng)) for _ in range(500)]
    assert min(lengths) in range(25, 30) and max(lengths) in range(71, 76)
    assert all(kept.draw("two", rng) == (5,) and kept.draw("one", rng) == () for _ in range(20))


def test_a_share_of_the_places_goes_on_from_what_was_right_before():
    one = pool()
    hard = taught(one)
    begun = [choice for step in range(1, 30) for (choice,) in one.plan(range(2 * step, 2 * step + 2)) if choice.prefix]
    assert {choice.entry for choice in begun} == {hard}, "of nobody else an answer is known"
    assert len(begun) == 1, "it is on its way: not again before its step is taken"
    assert 1 <= len(begun[0].prefix) <= 4 and begun[0].prefix == (7, 8, 9, 10, 2)[: len(begun[0].prefix)]
    plain = curriculum(prompts(60))
    assert not any(choice.prefix for step in range(9) for (choice,) in plain.plan(range(step, step + 1)))


def test_no_posterior_learns_from_a_begun_answer():
    one = pool()
    hard = taught(one)
    number = one.entries.id_of[hard]
    before = one.difficulty.posterior(np.array([number]))
    for step in range(1, 30):
        planned = [turns[0] for turns in one.plan(range(2 * step, 2 * step + 2))]
        begun = [outcome(2 * step + i, 0, choice, 16, 1) for i, choice in enumerate(planned) if choice.prefix]
        one.learn(1, begun, planned)
        if begun:
            break
    assert begun and one.sampled[hard] == 2 and one.difficulty.tried[number] == 1
    assert np.allclose(before, one.difficulty.posterior(np.array([number])))


def test_what_was_written_down_begins_the_same_answers():
    one = pool()
    taught(one)
    other = pool()
    other.restore(json.loads(json.dumps(one.state())))
    for step in range(1, 12):
        slots = range(2 * step, 2 * step + 2)
        assert one.plan(slots) == other.plan(slots)
    assert other.prefixes.known == one.prefixes.known != {}
