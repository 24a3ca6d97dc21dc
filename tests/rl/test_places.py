"""The life of one slot, by hand."""

import copy

from rewards.task import Task
from rl.gates import Choice
from rl.places import Part, Place
from rl.types import Rollout, SampledAnswer


def part(turn, *scores, leased_at=0):
    task = Task(task_id=f"t{turn}", domain="maths", level=1, prompt="p", verifier="text")
    answer = SampledAnswer(token_ids=[1], logprobs=[-1.0], versions=[leased_at], finish_reason="stop")
    rollouts = [
        Rollout(task=task, group_id=f"7.{turn}", answer=answer, text="", score=score, reason="") for score in scores
    ]
    return Part(task=task, prompt_ids=[turn], rollouts=rollouts, leased_at=leased_at)


def place(turns=2):
    return Place(choices=[Choice(entry=f"e{turn}", size=4, known=0.0, expected=0.5) for turn in range(turns)])


def scores_of(group):
    return [rollout.score for rollout in group.rollouts]


def test_parts_of_one_task_become_one_group_of_the_version_that_began_it():
    slot = place()
    assert not slot.settles("more") and slot.settles("keep") and not slot.settles("replace")
    slot.accept(part(0, 1.0, 0.0, leased_at=3), "more")
    assert not slot.settled and slot.choice.entry == "e0" and len(slot.rollouts) == 2
    slot.accept(part(0, 0.0, leased_at=5), "keep")
    assert slot.settled and slot.rollouts == []
    assert scores_of(slot.group) == [1.0, 0.0, 0.0] and slot.group.leased_at_version == 3
    assert [(choice.entry, group) for choice, group in slot.outcomes()] == [("e0", slot.group)]


def test_a_task_without_signal_gives_its_place_to_the_next_and_is_not_forgotten():
    slot = place()
    slot.accept(part(0, 0.0, 0.0), "replace")
    assert slot.choice.entry == "e1" and slot.settles("replace") and not slot.settled
    slot.accept(part(1, 1.0, leased_at=2), "more")
    slot.accept(part(1, 0.0, leased_at=2), "keep")
    assert [(choice.entry, scores_of(group)) for choice, group in slot.outcomes()] == [
        ("e0", [0.0, 0.0]), ("e1", [1.0, 0.0])
    ]  # fmt: skip
    assert slot.group.task.task_id == "t1" and slot.group.prompt_ids == [1] and slot.group.leased_at_version == 2


def test_a_slot_whose_every_task_is_without_signal_is_settled_and_empty():
    slot = place()
    for turn in range(2):
        slot.accept(part(turn, 1.0), "replace")
    assert slot.settled and slot.group is None
    assert [choice.entry for choice, _ in slot.outcomes()] == ["e0", "e1"]


def test_a_copy_stays_what_it_was():
    slot = place()
    slot.accept(part(0, 0.0), "more")
    before, as_it_was = copy.copy(slot), copy.deepcopy(slot)
    slot.accept(part(0, 0.0), "replace")
    assert before == as_it_was != slot
