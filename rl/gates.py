"""What becomes of a group once some of its answers are there: small classes behind one protocol, `curriculum.gate`.

    none           every group is trained on as it is
    dapo           sample the whole group; one without signal gives its place to another task (DAPO 2025, bounded)
    speed          sample a few answers; go on to the whole group only where some are right and some wrong, or where
                   little is known of the task. The first few are part of the group (SPEED-RL 2025)
    module:Class   your own: built with the curriculum's rules, importable where `drover` is started

A verdict is given whenever a part of a group has arrived, so in any order. It may depend on its arguments and on what
`learn` was told, and must change nothing: `learn` gets the groups of a step when that is taken, in the order of slots.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Verdict = Literal["keep", "more", "replace"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A task for a slot, as it was chosen when its step was planned."""

    entry: str  # of the pool
    size: int  # answers of its whole group
    known: float  # answers' worth of evidence behind its posterior: its own, its neighbours', the judge's
    expected: float  # pass rate, the posterior's mean
    prefix: tuple[int, ...] = ()  # token ids that every answer begins with: `rl/prefixes.py`


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one choice."""

    slot: int
    turn: int  # 0 for the slot's first task
    choice: Choice
    passes: int
    total: int  # graded answers
    version: int  # of the weights that began it
    answers: int  # sampled, those that nobody could grade included
    tokens: int  # generated
    trained_tokens: int
    kept: bool  # it is what its slot was trained on
    right: tuple[int, ...] = ()  # token ids of its shortest right answer, prefix included


class Gate(Protocol):
    replaces: bool  # may say "replace": other tasks are then chosen beforehand

    def first(self, choice: Choice) -> int:
        """How many answers to sample before the first verdict, at most the group's size."""
        ...

    def verdict(self, choice: Choice, scores: Sequence[float | None]) -> Verdict:
        """keep: train on the group as it is. more: sample what is missing to its size. replace: another task."""
        ...

    def learn(self, outcomes: Sequence[Outcome]) -> None: ...

    def metrics(self) -> dict[str, float]:
        """Named in a step's row as `gate/…`."""
        ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: Mapping[str, Any]) -> None: ...


def has_signal(scores: Sequence[float | None]) -> bool:
    """Two graded answers that were scored differently: every estimator of the advantage is 0 without."""
    return len({score for score in scores if score is not None}) > 1


class Open:
    replaces = False

    def first(self, choice: Choice) -> int:
        return choice.size

    def verdict(self, choice: Choice, scores: Sequence[float | None]) -> Verdict:
        return "keep"

    def learn(self, outcomes: Sequence[Outcome]) -> None:
        pass

    def metrics(self) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        pass


class Dapo(Open):
    replaces = True

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()

    def verdict(self, choice: Choice, scores: Sequence[float | None]) -> Verdict:
        return "keep" if has_signal(scores) else "replace"

    def learn(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            self.seen["kept" if outcome.kept else "replaced"] += 1

    def metrics(self) -> dict[str, float]:
        return {"kept_share": self.seen["kept"] / max(1, self.seen.total())}

    def state(self) -> dict[str, Any]:
        return {"seen": dict(self.seen)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.seen = Counter(state["seen"])


class Speed(Dapo):
    def __init__(self, screen: int, rare_answers: float) -> None:
        super().__init__()
        self.screen, self.rare_answers = screen, rare_answers

    def first(self, choice: Choice) -> int:
        return min(self.screen, choice.size)

    def verdict(self, choice: Choice, scores: Sequence[float | None]) -> Verdict:
        if len(scores) < choice.size and (has_signal(scores) or choice.known < self.rare_answers):
            return "more"
        return super().verdict(choice, scores)

    def learn(self, outcomes: Sequence[Outcome]) -> None:
        super().learn(outcomes)
        self.seen["screened out"] += sum(outcome.answers < outcome.choice.size for outcome in outcomes)

    def metrics(self) -> dict[str, float]:
        groups = self.seen["kept"] + self.seen["replaced"]
        shares = {"kept_share": self.seen["kept"], "screened_out_share": self.seen["screened out"]}
        return {name: number / max(1, groups) for name, number in shares.items()}
