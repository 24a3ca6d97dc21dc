"""Training again on what a recent step was trained on, within the staleness budget. No torch, ray or vllm.

A group whose answers were scored differently still teaches when the policy has moved a little: the ratio to the policy
that sampled it, and its trust region, are those of any stale token (DOTS-RR, Sun et al. 2025). It costs learner time
and no generated token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rl.types import RolloutGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayable:
    step: int  # whose batch it was part of first
    group: RolloutGroup


def oldest_version(group: RolloutGroup) -> int:
    return min(version for rollout in group.rollouts for version in rollout.answer.versions)


def to_replay(known: Sequence[Replayable], step: int, *, for_steps: int, max_staleness: int) -> list[Replayable]:
    """Those that step may be trained on: of the last `for_steps` steps before it, no token staler than
    `max_staleness`; the oldest first."""
    return [
        one for one in known
        if step - one.step <= for_steps and step - oldest_version(one.group) <= max_staleness
    ]  # fmt: skip
