"""What becomes of one slot, from its plan to its step: the parts of its group, and the groups it gave up on the way.

    choices   [ first task,   the next,   … ]         planned with the step, `rl/curriculum.py`
                  │ part, part: no signal ─▶ discarded
                  └─────────▶ part ─▶ more ─▶ part: signal ─▶ group, settled
                              … no choice is left ─▶ settled without a group: the step's batch is smaller

Only parts that the controller accepted come in here, so what is saved and resumed is proved. Plain data: a place is
written to disk as it stands.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from rewards.task import Task
from rl.gates import Choice, Verdict
from rl.types import Rollout, RolloutGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one lease brought."""

    task: Task
    prompt_ids: list[int]
    rollouts: list[Rollout]
    leased_at: int  # version

    def after(self, rollouts: list[Rollout], leased_at: int) -> Part:
        """With the earlier answers of its group, which were begun at another version."""
        return replace(self, rollouts=[*rollouts, *self.rollouts], leased_at=leased_at) if rollouts else self

    def group(self) -> RolloutGroup:
        return RolloutGroup(
            group_id=self.rollouts[0].group_id, task=self.task, prompt_ids=self.prompt_ids, rollouts=self.rollouts,
            leased_at_version=self.leased_at,
        )  # fmt: skip


@dataclass(kw_only=True)
class Place:
    choices: list[Choice]
    turn: int = 0  # whose task is being sampled; all of them: settled without a group
    rollouts: list[Rollout] = field(default_factory=list)  # of that task so far
    leased_at: int = -1  # version that began it
    discarded: list[RolloutGroup] = field(default_factory=list)  # of the turns before, one each
    group: RolloutGroup | None = None  # settled: what is trained on

    @property
    def choice(self) -> Choice:
        return self.choices[self.turn]

    @property
    def settled(self) -> bool:
        return self.group is not None or self.turn == len(self.choices)

    def settles(self, verdict: Verdict) -> bool:
        """Is the slot ready with a part of this verdict?"""
        return verdict == "keep" or (verdict == "replace" and self.turn + 1 == len(self.choices))

    def accept(self, part: Part, verdict: Verdict) -> None:
        """Lists are replaced, not changed: a copy of a place that is being saved stays what it was."""
        part = part.after(self.rollouts, self.leased_at)
        self.rollouts, self.leased_at = (part.rollouts, part.leased_at) if verdict == "more" else ([], -1)
        if verdict == "keep":
            self.group = part.group()
        elif verdict == "replace":
            self.discarded = [*self.discarded, part.group()]
            self.turn += 1

    def outcomes(self) -> list[tuple[Choice, RolloutGroup]]:
        """Every choice that was sampled, in turn, with what it gave; the kept group is the last."""
        groups = [*self.discarded, *([self.group] if self.group else [])]
        return list(zip(self.choices, groups))
