"""One step's answers, counted by hand."""

from rewards.task import Task
from rl.gates import Choice
from rl.places import Part, Place
from rl.step_metrics import answer_metrics, outcomes_of
from rl.types import Rollout, SampledAnswer


def part(turn, domain, level, *answers):
    """`answers`: (token ids, score, finish reason)."""
    task = Task(task_id=f"t{turn}", domain=domain, level=level, prompt="p", verifier="text")
    rollouts = [
        Rollout(
            task=task, group_id=f"7.{turn}", text="", score=score, reason="",
            answer=SampledAnswer(token_ids=ids, logprobs=[-1.0] * len(ids), versions=[3] * len(ids), finish_reason=end),
        )
        for ids, score, end in answers
    ]  # fmt: skip
    return Part(task=task, prompt_ids=[turn], rollouts=rollouts, leased_at=3)


def settled_place():
    """The first task was hopeless and gave way; the second began with two tokens, and one answer is ungraded."""
    choices = [
        Choice(entry="hopeless", size=2, known=0.0, expected=0.5),
        Choice(entry="mixed", size=4, known=0.0, expected=0.5, prefix=(8, 9)),
    ]
    place = Place(choices=choices)
    place.accept(part(0, "maths", 9, ([1], 0.0, "length"), ([1, 2], 0.0, "stop")), "replace")
    mixed = (([1, 2, 3], 1.0, "stop"), ([4, 5], 1.0, "stop"), ([6], 0.0, "stop"), ([7], None, "stop"))
    place.accept(part(1, "code", 2, *mixed), "keep")
    return place


def test_outcomes_tell_each_task_that_the_slot_came_to():
    hopeless, mixed = outcomes_of(7, settled_place(), {"7.1": 6})
    assert (hopeless.slot, hopeless.turn, hopeless.choice.entry, hopeless.kept) == (7, 0, "hopeless", False)
    assert (hopeless.passes, hopeless.total, hopeless.tokens, hopeless.trained_tokens) == (0, 2, 3, 0)
    assert hopeless.right == () and hopeless.version == 3
    assert (mixed.turn, mixed.kept, mixed.passes, mixed.total, mixed.answers) == (1, True, 2, 3, 4)
    assert (mixed.tokens, mixed.trained_tokens) == (7, 6)
    assert mixed.right == (8, 9, 4, 5)  # the shortest right one, with what it was given


def test_metrics_count_all_that_was_sampled_and_what_was_trained_on():
    place = settled_place()
    outcomes = list(outcomes_of(7, place, {"7.1": 6}))
    metrics = answer_metrics([place.group], place.discarded, outcomes, shaped=lambda rollout: rollout.score)
    assert (metrics["groups"], metrics["groups_discarded"], metrics["answers_per_group"]) == (2, 1, 3.0)
    assert (metrics["zero_signal_groups"], metrics["signal_share"]) == (1, 0.5)
    assert (metrics["pass_rate"], metrics["reward_mean"], metrics["ungraded"]) == (0.4, 0.4, 1)  # 2 of 5 graded
    assert (metrics["answer_tokens_mean"], metrics["truncated_share"]) == (10 / 6, 1 / 6)
    assert (metrics["discarded_tokens"], metrics["trained_tokens_by_domain"]) == (3, {"code": 6})
    assert (metrics["groups_begun"], metrics["reused_tokens"]) == (1, 8)
    assert metrics["levels"] == {"maths": 9.0, "code": 2.0}


def test_a_kept_group_nobody_trained_on_has_no_signal_and_a_penalty_makes_some_in_a_discarded_one():
    place = settled_place()
    outcomes = list(outcomes_of(7, place, {}))

    def shaped(rollout):
        return rollout.score if rollout.answer.finish_reason == "stop" else -1.0

    metrics = answer_metrics([place.group], place.discarded, outcomes, shaped)
    assert (metrics["zero_signal_groups"], metrics["signal_share"]) == (1, 0.5)
