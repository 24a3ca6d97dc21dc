"""What the answers of one step say, as plain arithmetic: what became of each sampled task, and the metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rl.gates import Outcome, has_signal
from rl.health import is_looping
from rl.places import Place
from rl.types import Rollout, RolloutGroup


def outcomes_of(slot: int, place: Place, trained: Mapping[str, int]) -> Iterator[Outcome]:
    """What became of the tasks that the slot came to, in turn. `trained`: tokens of each group that was trained on."""
    for turn, (choice, group) in enumerate(place.outcomes()):
        scores = [rollout.score for rollout in group.rollouts if rollout.score is not None]
        right = [rollout.answer.token_ids for rollout in group.rollouts if (rollout.score or 0.0) >= 1.0]
        yield Outcome(
            slot=slot, turn=turn, choice=choice, passes=sum(score >= 1.0 for score in scores), total=len(scores),
            version=group.leased_at_version, answers=len(group.rollouts),
            tokens=sum(len(rollout.answer.token_ids) for rollout in group.rollouts),
            trained_tokens=trained.get(group.group_id, 0), kept=group is place.group,
            right=(*choice.prefix, *min(right, key=len)) if right else (),
        )  # fmt: skip


def answer_metrics(
    kept: Sequence[RolloutGroup],
    discarded: Sequence[RolloutGroup],
    outcomes: Sequence[Outcome],
    shaped: Callable[[Rollout], float | None],
) -> dict[str, Any]:
    """The metrics of all that was sampled for a step. `shaped`: an answer's score as it is trained on.

    A kept group is without signal where none of its tokens was trained on, a discarded one where its scores are alike.
    `kept` are in the order of their outcomes. Where nobody could grade anything there is no mean score.
    """
    groups = [*kept, *discarded]
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    scores = [rollout.score for rollout in rollouts if rollout.score is not None]
    kept_outcomes = [one for one in outcomes if one.kept]
    without = sum(not one.trained_tokens for one in kept_outcomes)
    without += sum(not has_signal([shaped(rollout) for rollout in group.rollouts]) for group in discarded)
    levels: dict[str, list[int]] = {}
    for group in groups:
        levels.setdefault(group.task.domain, []).append(group.task.level)
    trained: Counter[str] = Counter()
    for group, outcome in zip(kept, kept_outcomes, strict=True):
        trained[group.task.domain] += outcome.trained_tokens
    means = {"reward_mean": sum(scores), "pass_rate": sum(score >= 1.0 for score in scores)}
    return {name: total / len(scores) for name, total in means.items() if scores} | {
        "answer_tokens_mean": sum(len(rollout.answer.token_ids) for rollout in rollouts) / len(rollouts),
        "truncated_share": sum(rollout.answer.finish_reason == "length" for rollout in rollouts) / len(rollouts),
        "repetition_share": sum(is_looping(rollout.answer.token_ids) for rollout in rollouts) / len(rollouts),
        "ungraded": len(rollouts) - len(scores),
        "zero_signal_groups": without,
        "signal_share": 1 - without / len(groups),
        "groups": len(groups),
        "groups_discarded": len(discarded),
        "groups_begun": sum(bool(one.choice.prefix) for one in outcomes),
        "reused_tokens": sum(len(one.choice.prefix) * one.answers for one in outcomes),
        "answers_per_group": len(rollouts) / len(groups),
        "discarded_tokens": sum(outcome.tokens for outcome in outcomes if not outcome.kept),
        "trained_tokens_by_domain": dict(trained),
        "levels": {domain: sum(values) / len(values) for domain, values in levels.items()},
    }
